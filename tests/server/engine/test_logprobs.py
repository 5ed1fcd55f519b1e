"""Log-probabilities of prompt and answer against transformers' own log-softmax."""

import pytest
import torch
from support.server_fixture import ServerFixture
from support.tiny import assert_close, hf_logits, random_tokens
from torch import Tensor

from quiver import Client
from quiver.results import TokenLogprob


def hf_logprobs(llama: ServerFixture, adapter_id: str, tokens: list[int]) -> Tensor:
    """Row i: of the token after tokens[i]. [S, V]"""
    logits = hf_logits(llama.oracles[adapter_id], torch.tensor([tokens]))[0]
    return torch.log_softmax(logits.float(), -1)


def assert_logprobs(items: tuple[TokenLogprob, ...], token_ids: list[int], rows: Tensor, num_top: int) -> None:
    """rows: [len(token_ids), V]."""
    assert [item.token_id for item in items] == token_ids
    chosen = rows.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    assert_close(torch.tensor([item.logprob for item in items]), chosen)
    values, ids = rows.topk(max(num_top, 1), -1)
    if not num_top:
        assert all(item.top == () for item in items)
        return
    assert_close(torch.tensor([[other.logprob for other in item.top] for item in items]), values)
    assert [[other.token_id for other in item.top] for item in items] == ids.tolist()


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


def test_none_unless_asked_for(client: Client) -> None:
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
