"""Log-probabilities of transformers, and how tests compare a server's with them."""

import torch
from support.server_fixture import ServerFixture
from support.tiny import assert_close, hf_logits
from torch import Tensor

from quiver.results import TokenLogprob


def hf_logprobs(bench: ServerFixture, adapter_id: str, tokens: list[int]) -> Tensor:
    """[S, V]. Row i is the distribution of the token after tokens[i]."""
    logits = hf_logits(bench.oracles[adapter_id], torch.tensor([tokens]))[0]
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
