"""Choosing the next token of each row. A draw depends on the row, its seed and its position: never on the batch."""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from quiver_peft.kernels.elementwise import argmax_finite
from quiver_server.engine.sequence import Sequence, TokenLogprob

NOT_FINITE = -1  # as `argmax_finite` has it: instead of a token, where a row's logits overflowed


@torch.inference_mode()
def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """The next token of each sequence, NOT_FINITE for one whose logits tell none. logits: [B, V]."""
    logits = logits.float()
    tokens: list[int] = argmax_finite(logits).tolist()
    others = [row for row, sequence in enumerate(sequences) if tokens[row] != NOT_FINITE and not _is_plain(sequence)]
    if others:
        # On the host, whatever the device: one copy, where each row's draw would wait several times.
        for row, row_logits in zip(others, logits[others].cpu(), strict=True):
            tokens[row] = _sample_row(row_logits, sequences[row])
    return tokens


def _is_plain(sequence: Sequence) -> bool:
    """Greedy with nothing to change: the argmax of the whole batch is the answer."""
    params = sequence.params
    return params.greedy and not params.has_penalties and len(sequence.generated) >= params.min_new_tokens


def _sample_row(logits: Tensor, sequence: Sequence) -> int:
    """logits: [V]. Order: penalties, temperature, top_k, top_p, min_p, then one draw.

    In double precision, and measured from the largest logit: no penalty or temperature of fp32 overflows it.
    """
    params = sequence.params
    logits = logits.double()
    if params.has_penalties:
        _apply_penalties(logits, sequence)
    if len(sequence.generated) < params.min_new_tokens:
        logits[list(params.stop_ids | params.eos_ids)] = -torch.inf
    if params.greedy:
        return int(logits.argmax())
    ordered, ids = torch.sort((logits - logits.max()) / params.temperature, descending=True, stable=True)
    if params.top_k:
        ordered = ordered[: params.top_k]
    probabilities = torch.softmax(ordered, -1)
    cumulative = probabilities.cumsum(-1)
    keep = cumulative - probabilities < params.top_p  # the first token that passes top_p belongs to the set
    keep &= probabilities >= params.min_p * probabilities[0]
    kept = probabilities[: int(keep.sum())]
    cumulative = kept.cumsum(-1)
    point = uniform(params.seed, sequence.index, len(sequence.generated)) * float(cumulative[-1])
    return int(ids[min(int(torch.searchsorted(cumulative, point, right=True)), len(kept) - 1)])


def _apply_penalties(logits: Tensor, sequence: Sequence) -> None:
    """Repetition: Keskar et al. 2019, on prompt and answer. Presence and frequency: OpenAI's, on the answer."""
    params = sequence.params
    seen = torch.tensor(sorted({*sequence.prompt, *sequence.generated}), device=logits.device)
    values = logits[seen]
    penalty = params.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.generated:
        ids, counts = torch.tensor(sequence.generated, device=logits.device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (Philox, counter-based: Salmon et al. 2011)."""
    # Typed: numpy would make floats of a list with a seed from 2^63 on, and round it.
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(generator).random())


def logprobs_of(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities under the model's own distribution. logits: [R, V], one row for each token."""
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [TokenLogprob(token, value) for token, value in zip(token_ids, chosen, strict=True)]
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), -1)
    return [
        TokenLogprob(token, value, tuple(zip(row_ids, row_values, strict=True)))
        for token, value, row_ids, row_values in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    ]
