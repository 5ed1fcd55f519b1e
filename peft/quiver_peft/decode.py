"""Greedy decoding of many prompts at once with the paged cache: for evaluation and prediction outside of a server."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from quiver_peft.adapters.bank_seam import RowGroup, VirtualRows
from quiver_peft.adapters.banks import FIRST_SLOT, AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.base.sites import NO_ADAPTERS, Seam
from quiver_peft.errors import QuiverError

BLOCK_TOKENS = 16


@dataclass
class _Row:
    index: int
    prompt: Sequence[int]
    blocks: list[int]
    generated: list[int] = field(default_factory=list[int])


def greedy_decode(
    base: GPTBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    weights: AdapterWeights | None = None,
    max_rows: int = 32,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, its stop token left out.

    Rows are decoded `max_rows` at a time; a finished row makes room for the next prompt at once.
    weights: of the adapter that answers, applied by the banks, as a server would; None: the base answers.
    on_finished: called with the number of new tokens whenever a row ends.
    Raises QuiverError for a prompt that is empty or leaves no room for its answer.
    """
    serving = _Serving(base, weights)
    _check_room(base, prompts, max_new_tokens, serving.num_virtual_tokens)
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens + serving.num_virtual_tokens
    blocks_per_row = -(-longest // BLOCK_TOKENS)
    weight = base.embedding.weight
    kv = PagedKV(base.config, max_rows * blocks_per_row, BLOCK_TOKENS, weight.dtype, weight.device)
    free = [list(range(i * blocks_per_row, (i + 1) * blocks_per_row)) for i in range(max_rows)]
    waiting = iter([_Row(i, prompt, []) for i, prompt in enumerate(prompts)])
    running: list[_Row] = []
    results: list[list[int]] = [[] for _ in prompts]
    while running := running + _admit(waiting, free):
        for row, token in zip(running, _step(base, kv, running, serving), strict=True):
            if token not in stop_ids:
                row.generated.append(token)
            if token in stop_ids or len(row.generated) == max_new_tokens:
                results[row.index] = row.generated
                free.append(row.blocks)
                row.blocks = []
                if on_finished is not None:
                    on_finished(len(row.generated))
        running = [row for row in running if row.blocks]
    return results


class _Serving:
    """The one adapter that answers, in banks of its own."""

    def __init__(self, base: GPTBase, weights: AdapterWeights | None) -> None:
        self.num_virtual_tokens = 0 if weights is None else weights.num_virtual_tokens
        self._banks: AdapterBanks | None = None
        if weights is not None:
            reference = base.embedding.weight
            self._banks = AdapterBanks.for_one(weights, reference.dtype, reference.device)

    def seam(self, first_rows: Sequence[int], num_rows: int) -> Seam:
        """first_rows: where sequences begin, virtual tokens first, in a batch of `num_rows`."""
        if self._banks is None:
            return NO_ADAPTERS
        length = self.num_virtual_tokens
        virtual = [VirtualRows(FIRST_SLOT, row, row + length, 0) for row in first_rows if length]
        return self._banks.seam([RowGroup(FIRST_SLOT, 0, num_rows)], virtual)


def _check_room(base: GPTBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_virtual: int) -> None:
    if max_new_tokens < 1:
        raise QuiverError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    limit = base.config.max_positions - num_virtual
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise QuiverError(f"prompt {index} is empty; there is nothing to continue")
        if len(prompt) + max_new_tokens > limit:
            raise QuiverError(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones that is over the {limit} "
                "positions of this base" + (f" beside {num_virtual} virtual tokens" if num_virtual else "")
            )


def _admit(waiting: Iterator[_Row], free: list[list[int]]) -> list[_Row]:
    """As many new rows as there is room for."""
    admitted: list[_Row] = []
    while free and (row := next(waiting, None)) is not None:
        row.blocks = free.pop()
        admitted.append(row)
    return admitted


@torch.inference_mode()
def _step(base: GPTBase, kv: PagedKV, rows: Sequence[_Row], serving: _Serving) -> list[int]:
    """One new token for each row: rows without any yet bring their whole prompt, virtual tokens first."""
    num_virtual = serving.num_virtual_tokens
    new = [[row.generated[-1]] if row.generated else [0] * num_virtual + list(row.prompt) for row in rows]
    lengths = [num_virtual + len(row.prompt) + len(row.generated) for row in rows]
    device = kv.keys.device
    layout = PagedLayout([len(ids) for ids in new], lengths, [row.blocks for row in rows], BLOCK_TOKENS, device)
    tokens = torch.tensor([token for ids in new for token in ids], device=device)
    positions = torch.cat([torch.arange(end - len(ids), end) for ids, end in zip(new, lengths, strict=True)])
    ends = list(accumulate(len(ids) for ids in new))
    starts = [end - len(ids) for end, ids in zip(ends, new, strict=True)]
    seam = serving.seam([start for start, row in zip(starts, rows, strict=True) if not row.generated], ends[-1])
    hidden = base(tokens, positions.to(device), PagedAttention(kv, layout), seam)
    return base.logits(hidden[torch.tensor(ends, device=device) - 1]).argmax(-1).tolist()
