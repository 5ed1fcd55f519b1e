"""Several prompts in one request: each is answered as by itself, or all are refused."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.http_completions import PROMPT, SAMPLED, assert_adds_up, complete, ids, stream
from support.live_server import eventually
from support.server_fixture import ServerFixture
from support.tiny import random_prompts, random_tokens
from transformers import AutoTokenizer

from quiver_peft import PromptTuningPEFTConfig, load_model

TEXTS = ["Where is my parcel?", "hello", "The box \N{SNOWMAN} was broken. " * 4]
TOKENS = random_prompts((3, 70, 1, 20), seed=5)


@pytest.fixture
def http(llama: ServerFixture) -> Iterator[OpenAI]:
    with llama.server.openai() as client:
        yield client


@pytest.mark.parametrize("adapter", ["", "all-r2", "keys-r16"])
@pytest.mark.parametrize("prompts", [TEXTS, TOKENS, [TEXTS[0], TOKENS[1]]], ids=["texts", "tokens", "both"])
def test_each_prompt_is_answered_as_hugging_face_does(
    llama: ServerFixture, http: OpenAI, adapter: str, prompts: list[Any]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(llama.base)  # type: ignore[no-untyped-call]
    tokens = [tokenizer(item).input_ids if isinstance(item, str) else item for item in prompts]
    answer = complete(http, adapter or llama.base.name, prompts, max_tokens=10, ignore_eos=True)
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    for choice, prompt in zip(answer.choices, tokens, strict=True):
        expected = llama.expected(adapter, prompt, 10)
        assert list(ids(choice))[: len(expected)] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, tokens))
    assert answer.usage.completion_tokens == 10 * len(prompts)


def test_candidates_are_numbered_prompt_by_prompt(http: OpenAI) -> None:
    """Candidate c of prompt p is number p * n + c, and the one that the prompt alone gives; so is a stream's."""
    parameters: dict[str, Any] = {**SAMPLED, "n": 3, "logprobs": 2, "max_tokens": 15}
    answer = complete(http, "mlp-r8", TOKENS, **parameters)
    alone = [complete(http, "mlp-r8", prompt, **parameters) for prompt in TOKENS]
    assert [choice.index for choice in answer.choices] == list(range(12))
    expected = [choice for item in alone for choice in item.choices]
    assert [(ids(c), c.text, c.logprobs) for c in answer.choices] == [(ids(c), c.text, c.logprobs) for c in expected]
    assert len({ids(choice) for choice in answer.choices}) == 12
    *chunks, last = stream(http, "mlp-r8", TOKENS, stream_options={"include_usage": True}, **parameters)
    assert_adds_up(chunks, answer)
    assert last.usage is not None and answer.usage is not None
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    assert answer.usage.completion_tokens == sum(item.usage.completion_tokens for item in alone if item.usage)


def test_one_prompt_twice_is_drawn_twice(http: OpenAI) -> None:
    """With a seed each draw is that of the prompt alone."""
    first, second = complete(http, "all-r2", [PROMPT, PROMPT], temperature=1.5, max_tokens=20, ignore_eos=True).choices
    assert ids(first) != ids(second)
    seeded = complete(http, "all-r2", [PROMPT, PROMPT], temperature=1.5, max_tokens=20, seed=4, ignore_eos=True)
    assert ids(seeded.choices[0]) == ids(seeded.choices[1])


def test_what_the_cache_holds_is_summed(http: OpenAI) -> None:
    prompts = [random_tokens(length, seed=90 + length).tolist() for length in (40, 70)]
    told = [complete(http, "one-r1", prompts, max_tokens=1).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in told if usage and usage.prompt_tokens_details]
    assert cached == [0, 32 + 64]


def test_one_failing_prompt_refuses_all_before_anything_runs(llama: ServerFixture, http: OpenAI) -> None:
    complete(http, "pattern-r3", "hello", max_tokens=1)
    before = llama.server.metric("quiver_prompt_tokens_total", adapter="pattern-r3")
    for wrong in ("", [5] * 256, [99999]):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(http, "pattern-r3", [*TEXTS, wrong])
        assert caught.value.param == "prompt[3]"
    assert llama.server.metric("quiver_prompt_tokens_total", adapter="pattern-r3") == before


def test_a_prompt_too_long_beside_the_adapters_virtual_tokens(llama: ServerFixture, http: OpenAI) -> None:
    """Which is known once the adapter is in memory."""
    model = load_model(llama.base)
    model.add_adapter(PromptTuningPEFTConfig(virtual_tokens=20))
    model.save_adapter(llama.adapters / "soft-over-http")
    assert complete(http, "soft-over-http", [PROMPT, [7] * 235], max_tokens=1).choices
    with pytest.raises(openai.BadRequestError) as caught:
        complete(http, "soft-over-http", [PROMPT, [7] * 236])
    assert caught.value.param == "prompt[1]"
    assert "prompt[1]: the prompt has 236 tokens; with the 20 virtual tokens" in str(caught.value)


def test_many_prompts_end_and_leave_nothing(llama: ServerFixture, http: OpenAI) -> None:
    """More than run at once, in a number that the server just holds."""
    answer = complete(http, "attention-r4", [[5 + i % 300] for i in range(288)], max_tokens=2, ignore_eos=True)
    assert [len(ids(choice)) for choice in answer.choices] == [2] * 288
    eventually(lambda: llama.server.metric("quiver_running_sequences") == 0)
    assert llama.server.metric("quiver_kv_usage_ratio") == 0
