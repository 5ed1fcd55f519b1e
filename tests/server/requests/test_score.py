"""Score against transformers: the log-softmax of a full pass over prompt and continuation."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from support.error_assertions import refusal
from support.logprobs import assert_logprobs, hf_logprobs
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, make_base, running_server
from support.tiny import EOS, PAD, assert_close, random_prompts, random_tokens
from torch import Tensor

from quiver import AdapterNotFound, Client, InvalidRequest, Score
from quiver_peft.tokenizer import Tokenizer

CONTEXT = 256
LENGTHS = (1, 7, 60, 2)


def expected_rows(bench: ServerFixture, adapter_id: str, prompt: list[int], continuation: list[int]) -> Tensor:
    """[len(continuation), V]"""
    return hf_logprobs(bench, adapter_id, prompt + continuation)[len(prompt) - 1 : -1]


def assert_score(score: Score, continuation: list[int], rows: Tensor, num_top: int = 0) -> None:
    assert_logprobs(score.logprobs, continuation, rows, num_top)
    chosen = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    assert_close(torch.tensor([score.total_logprob]), chosen.sum()[None], 1e-3)
    assert score.is_greedy == (rows.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize("adapter_id", ["", "pattern-r3"])
@pytest.mark.parametrize("num_prompt", [1, 110])
@pytest.mark.parametrize("num_top", [0, 3])
def test_scores_equal_transformers(
    llama: ServerFixture, client: Client, adapter_id: str, num_prompt: int, num_top: int
) -> None:
    """Prompts of one token and of more than one step; continuations of several lengths, one longer than a step."""
    prompt = random_tokens(num_prompt, seed=8).tolist()
    continuations = random_prompts(LENGTHS, seed=3)
    scoring = client.score(prompt, continuations, adapter=adapter_id, top_logprobs=num_top)
    for score, continuation in zip(scoring.scores, continuations, strict=True):
        assert_score(score, continuation, expected_rows(llama, adapter_id, prompt, continuation), num_top)
    assert (scoring.usage.prompt_tokens, scoring.usage.generated_tokens) == (num_prompt, 0)
    assert (scoring.adapter.id if scoring.adapter else "") == adapter_id


def test_greedy_continuations_are_marked(client: Client) -> None:
    prompt = random_tokens(12, seed=1).tolist()
    answer = client.generate(prompt, adapter="all-r2", max_new_tokens=6, ignore_eos=True, logprobs=True)
    given = list(answer.token_ids)
    other = [*given[:-1], (given[-1] + 1) % 300]
    same, different = client.score(prompt, [given, other], adapter="all-r2").scores
    assert (same.is_greedy, different.is_greedy) == (True, False)
    drawn = torch.tensor([item.logprob for item in answer.candidates[0].logprobs])
    assert_close(torch.tensor([item.logprob for item in same.logprobs]), drawn)


def test_text_is_tokenized_by_itself(llama: ServerFixture, client: Client) -> None:
    tokenizer = Tokenizer(llama.base)
    ids = tokenizer.encode(" your order", add_special_tokens=False)
    by_text, by_ids = client.score("Where is", [" your order", ids]).scores
    assert [item.token_id for item in by_text.logprobs] == ids
    assert by_text == by_ids
    assert_score(by_text, ids, expected_rows(llama, "", tokenizer.encode("Where is"), ids))


def test_scores_are_independent_of_the_batch(llama: ServerFixture, client: Client) -> None:
    """Every adapter's scores at once, among generating requests."""
    prompt, continuations = random_tokens(30, seed=4).tolist(), random_prompts((5, 20), seed=9)
    names = ["", *LLAMA_ADAPTERS]

    def ask(name: str) -> tuple[Score, ...]:
        client.generate(prompt[:5], adapter=name, max_new_tokens=3)
        return client.score(prompt, continuations, adapter=name).scores

    with ThreadPoolExecutor(len(names)) as threads:
        answers = dict(zip(names, threads.map(ask, names), strict=True))
    for name, scores in answers.items():
        for score, continuation in zip(scores, continuations, strict=True):
            assert_score(score, continuation, expected_rows(llama, name, prompt, continuation))


def test_scoring_generates_nothing_and_leaves_nothing(llama: ServerFixture, client: Client) -> None:
    client.score([5, 6], [[7]], adapter="one-r1")
    before = [llama.server.metric(f"quiver_{kind}_tokens_total", adapter="one-r1") for kind in ("prompt", "generated")]
    client.score([5, 6, 7], [[8, 9], [10]], adapter="one-r1")
    after = [llama.server.metric(f"quiver_{kind}_tokens_total", adapter="one-r1") for kind in ("prompt", "generated")]
    assert [after[0] - before[0], after[1] - before[1]] == [6, 0]
    assert llama.server.metric("quiver_kv_usage_ratio") == 0


def test_continuations_share_the_prompt(llama: ServerFixture, client: Client) -> None:
    """What is in the prefix cache is not computed again, and the scores stay exact."""
    prompt = random_tokens(100, seed=77).tolist()
    continuations = random_prompts((3, 30), seed=11)
    client.score(prompt, continuations, adapter="mlp-r8")
    before = llama.server.metric("quiver_cached_prompt_tokens_total", adapter="mlp-r8")
    scoring = client.score(prompt, continuations, adapter="mlp-r8")
    assert llama.server.metric("quiver_cached_prompt_tokens_total", adapter="mlp-r8") - before == 96
    for score, continuation in zip(scoring.scores, continuations, strict=True):
        assert_score(score, continuation, expected_rows(llama, "mlp-r8", prompt, continuation))


REFUSED: list[tuple[Sequence[int], list[str | Sequence[int]], str]] = [
    ([5], [], "continuations is 0; it must be from 1 to 128 of them"),
    ([5], [[6]] * 129, "continuations is 129; it must be from 1 to 128 of them"),
    ([5], [[6], []], "continuations[1] is empty; it must be at least one token"),
    ([5], [""], "continuations[0] is empty; it must be at least one token"),
    ([5], [[6], [320]], "continuations[1] is 320; it must be below the vocabulary size 320"),
    ([], [[6]], "the prompt is empty; it must have at least one token"),
    ([5] * 200, [[6], [6] * 57], f"with a continuation of 57 it must fit into the context of {CONTEXT}"),
]


@pytest.mark.parametrize(("prompt", "continuations", "fragment"), REFUSED, ids=[row[2][:40] for row in REFUSED])
@pytest.mark.usefixtures("still_serving")
def test_impossible_scoring_requests(
    client: Client, prompt: list[int], continuations: list[str | Sequence[int]], fragment: str
) -> None:
    error = refusal(lambda: client.score(prompt, continuations), InvalidRequest, fragment)
    assert error.reason == "INVALID_REQUEST"


def test_impossible_top_logprobs_and_unknown_adapter(client: Client) -> None:
    refusal(lambda: client.score([5], [[6]], top_logprobs=21), InvalidRequest, "top_logprobs is 21; it must be at most")
    refusal(lambda: client.score([5], [[6]], adapter="nobody"), AdapterNotFound, "no adapter has the id 'nobody'")


def test_the_whole_context_can_be_scored(llama: ServerFixture, client: Client) -> None:
    prompt, continuation = random_tokens(200, seed=2).tolist(), random_tokens(56, seed=6).tolist()
    (score,) = client.score(prompt, [continuation]).scores
    assert_score(score, continuation, expected_rows(llama, "", prompt, continuation))


def decoder_rows(bench: ServerFixture, adapter_id: str, source: list[int], target: list[int]) -> Tensor:
    """[len(target), V]"""
    with torch.no_grad():
        out = bench.oracles[adapter_id](
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[PAD, *target[:-1]]])
        )
    return torch.log_softmax(out.logits[0].float(), -1)


@pytest.mark.slow
def test_an_encoder_decoder_scores_what_its_decoder_would_answer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "t5")
    adapters = {"lora-r4": {"rank": 4, "targets": ["q", "v"]}}
    source, targets = random_tokens(20, seed=5).tolist(), [[7, 30, EOS], random_tokens(40, seed=7).tolist()]
    with running_server(tmp_path, base, adapters, "--http-port", "0") as bench, bench.server.client() as client:
        with bench.server.openai() as http, pytest.raises(openai.BadRequestError) as caught:
            http.completions.create(model="lora-r4", prompt=source, echo=True, logprobs=0)
        assert caught.value.param == "echo"
        for adapter_id in ("", "lora-r4"):
            scores = client.score(source, targets, adapter=adapter_id, top_logprobs=2).scores
            for score, target in zip(scores, targets, strict=True):
                assert_score(score, target, decoder_rows(bench, adapter_id, source, target), 2)
