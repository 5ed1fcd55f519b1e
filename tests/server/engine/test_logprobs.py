"""Log-probabilities of prompt and answer against transformers' own log-softmax."""

import pytest
from support.logprobs import assert_logprobs, hf_logprobs
from support.server_fixture import ServerFixture
from support.tiny import random_tokens

from quiver import Client


@pytest.mark.parametrize("adapter_id", ["", "pattern-r3"])
@pytest.mark.parametrize("num_top", [0, 5])
def test_logprobs_of_prompt_and_answer(llama: ServerFixture, client: Client, adapter_id: str, num_top: int) -> None:
    """The prompt is longer than a step, so that its log-probabilities come from several chunks."""
    prompt = random_tokens(110, seed=8).tolist()
    answer = client.generate(
        prompt,
        adapter=adapter_id,
        max_new_tokens=12,
        temperature=1.5,
        seed=2,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=num_top,
        prompt_logprobs=True,
    )
    tokens = list(answer.token_ids)
    rows = hf_logprobs(llama, adapter_id, prompt + tokens)
    candidate = answer.candidates[0]
    assert_logprobs(candidate.logprobs, tokens, rows[len(prompt) - 1 : -1], num_top)
    assert_logprobs(candidate.prompt_logprobs, prompt[1:], rows[: len(prompt) - 1], num_top)


def test_logprobs_absent_by_default(client: Client) -> None:
    candidate = client.generate([5, 6, 7], max_new_tokens=3).candidates[0]
    assert (candidate.logprobs, candidate.prompt_logprobs) == ((), ())


def test_top_logprobs_imply_logprobs(client: Client) -> None:
    candidate = client.generate([5, 6, 7], max_new_tokens=3, top_logprobs=2, ignore_eos=True).candidates[0]
    assert [len(item.top) for item in candidate.logprobs] == [2, 2, 2]
    assert all(item.top[0].token_id == item.token_id for item in candidate.logprobs), "greedy"


def test_stream_carries_prompt_logprobs_first(client: Client) -> None:
    pieces = list(client.stream([5, 6, 7, 8], max_new_tokens=3, prompt_logprobs=True, ignore_eos=True))
    assert [item.token_id for item in pieces[0].prompt_logprobs] == [6, 7, 8]
    assert all(piece.prompt_logprobs == () for piece in pieces[1:])
