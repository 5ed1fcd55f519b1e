"""The prefix cache changes no answer: same prompts under the base, adapters and revisions, shared and not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server.adapters.test_lifecycle import replace_files
from support.engine_driver import Driver
from support.live_server import answer_tokens
from support.sequences import sequence
from support.server_fixture import ServerFixture, make_base, running_server
from support.tiny import hf_lora, random_tokens

from quiver_peft import PrefixPEFTConfig, PromptTuningPEFTConfig, load_model
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.t5 import T5Base
from quiver_server.engine.sequence import Sequence

PROMPT = random_tokens(21, seed=8).tolist()


@pytest.fixture(scope="module")
def base(llama_base: Path) -> GPTBase:
    return GPTBase.from_pretrained(llama_base)


def adapter(folder: Path, base_folder: Path, base: Any, config: Any, seed: int) -> AdapterWeights:
    """One adapter of our own, every trained number random."""
    model = load_model(base_folder)
    model.add_adapter([config])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trainable_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_adapter(folder)
    return read_adapter(folder, base)


def asking(driver: Driver, weights: AdapterWeights | None, prompt: list[int], **params: Any) -> Sequence:
    """A sequence for an adapter that is put into a slot of its own, as after a reload."""
    item = sequence(prompt, max_new_tokens=6, **params)
    if weights is not None:
        slot = driver.banks.insert(weights)
        assert slot is not None
        item.slot, item.revision, item.num_virtual_tokens = slot, weights.revision, weights.num_virtual_tokens
    return item


def test_base_adapters_and_a_reloaded_one_never_mix(base: GPTBase, llama_base: Path, tmp_path: Path) -> None:
    """The same prompt again and again, an adapter's files replaced meanwhile: as without the cache, token by token."""
    for name, seed in (("a", 1), ("b", 2), ("a-new", 3)):
        hf_lora(llama_base, tmp_path / name, targets="all-linear", seed=seed)
    revisions = [read_adapter(tmp_path / name, base) for name in ("a", "b", "a-new")]
    shared, alone = Driver(base, 200), Driver(base, 200, share=False)
    answers: list[list[int]] = []
    for weights in [None, *revisions, None, *revisions]:
        (expected,), (found,) = (d.run([asking(d, weights, PROMPT)]) for d in (alone, shared))
        assert found == expected
        answers.append(found)
    assert len(set(map(tuple, answers[:4]))) == 4, "the adapters must matter"
    assert answers[:4] == answers[4:]
    num_reused = 4 * 20
    assert alone.runner.num_rows - shared.runner.num_rows == num_reused


@pytest.mark.parametrize("config", [PromptTuningPEFTConfig(virtual_tokens=9), PrefixPEFTConfig(virtual_tokens=10)])
def test_virtual_tokens_are_computed_once_for_a_revision(
    base: GPTBase, llama_base: Path, tmp_path: Path, config: Any
) -> None:
    first, second = (adapter(tmp_path / f"v{seed}", llama_base, base, config, seed) for seed in (1, 2))
    shared, alone = Driver(base, 200), Driver(base, 200, share=False)
    prompts = [random_tokens(length, seed=length).tolist() for length in (1, 3, 7, 12)]
    for prompt in prompts:
        for weights in (first, second):
            expected, found = (d.run([asking(d, weights, prompt)]) for d in (alone, shared))
            assert found == expected
    assert alone.runner.num_rows - shared.runner.num_rows == 2 * 3 * 8, "two blocks of virtual tokens, three times"


def test_a_t5_source_is_read_once(tmp_path: Path) -> None:
    base = load_base(make_base(tmp_path / "t5", "t5"))
    assert isinstance(base, T5Base)
    start = base.config.start_token_id
    sources = [PROMPT[:11], PROMPT[:11], PROMPT[:12], PROMPT[:11]]
    answers: dict[bool, list[list[int]]] = {}
    for share in (False, True):
        driver = Driver(base, 200, share=share)
        items = [sequence([start], max_new_tokens=9) for _ in sources]
        for item, source in zip(items, sources, strict=True):
            item.encoder_input = list(source)
        answers[share] = driver.run(items[:1]) + driver.run(items[1:])
        assert [item.num_reused_tokens for item in items] == ([0, 11, 0, 11] if share else [0, 0, 0, 0])
    assert answers[True] == answers[False]
    assert answers[True][0] != answers[True][2]


def test_a_small_cache_and_shared_beginnings(base: GPTBase) -> None:
    """Blocks are shared, taken and computed again in one run that steps back many times."""
    prompts = [PROMPT[: 4 * i] + random_tokens(6, seed=i).tolist() for i in range(1, 6)] * 2

    def ask() -> list[Sequence]:
        return [sequence(prompt, max_new_tokens=10, temperature=0.8, seed=i) for i, prompt in enumerate(prompts)]

    alone, small = Driver(base, 400, share=False), Driver(base, 14)
    assert small.run(ask()) == alone.run(ask())
    assert small.num_step_backs > 0, "the cache was not small enough to show anything"


def test_a_failing_step_leaves_nothing_to_share(base: GPTBase) -> None:
    driver = Driver(base, 40, max_step_tokens=32)
    driver.runner.should_fail = lambda batch: True
    assert driver.run([sequence(PROMPT)]) == [[]]
    again = sequence(PROMPT)
    assert driver.run([again]) == Driver(base, 40).run([sequence(PROMPT)])
    assert again.num_reused_tokens == 0


@pytest.fixture(scope="module")
def served(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    settings = {"lora": {"rank": 4, "targets": "all-linear"}}
    with running_server(tmp_path_factory.mktemp("prefix"), llama_base, settings) as bench:
        yield bench


def test_the_answer_says_what_was_cached(served: ServerFixture) -> None:
    prompt = random_tokens(40, seed=77).tolist()
    with served.server.client() as client:
        for name in ("", "lora"):
            for cached in (0, 32, 32):
                answer = client.generate(prompt, adapter=name, max_new_tokens=9)
                assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (40, cached)
                assert answer_tokens(answer) == served.expected(name, prompt, 9)
        asking = client.generate(prompt, max_new_tokens=1, prompt_logprobs=True)
        assert asking.usage.cached_tokens == 0
        assert len(asking.candidates[0].prompt_logprobs) == 39
        several = client.generate(prompt[::-1], max_new_tokens=4, n=3, temperature=1.0, seed=5)
        assert several.usage.cached_tokens == 0, "computed once, for the first of them"
    assert served.server.metric("quiver_cached_prompt_tokens_total", adapter="lora") == 64


def test_a_replaced_adapter_never_sees_what_the_old_one_cached(served: ServerFixture, tmp_path: Path) -> None:
    prompt = random_tokens(50, seed=78).tolist()
    served.add("replaced", rank=4, targets="all-linear", seed=41)
    oracle = hf_lora(served.base, tmp_path / "new", rank=4, targets="all-linear", seed=42)
    with served.server.client() as client:
        client.generate(prompt, adapter="replaced", max_new_tokens=9)
        old = client.generate(prompt, adapter="replaced", max_new_tokens=9)
        assert answer_tokens(old) == served.expected("replaced", prompt, 9)
        assert old.usage.cached_tokens == 48
        replace_files(tmp_path / "new", served.adapters / "replaced")
        client.load_adapter("replaced")
        served.oracles["replaced"] = oracle
        for cached in (0, 48):
            new = client.generate(prompt, adapter="replaced", max_new_tokens=9)
            assert answer_tokens(new) == served.expected("replaced", prompt, 9)
            assert new.usage.cached_tokens == cached
        assert new.token_ids != old.token_ids
        client.unload_adapter("replaced")
        assert client.generate(prompt, adapter="replaced", max_new_tokens=9).usage.cached_tokens == 48


def test_without_the_cache_nothing_is_found(llama_base: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, llama_base, {}, "--no-prefix-cache") as bench, bench.server.client() as client:
        for _ in range(2):
            assert client.generate([5] * 40, max_new_tokens=3).usage.cached_tokens == 0
