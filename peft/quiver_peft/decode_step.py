"""One step of greedy decoding for a GPT and for a T5: the next token of each row, all in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from quiver_peft.adapters.serving.banks import FIRST_SLOT, AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup, VirtualRows
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.base import Base
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.base.paged_t5 import PackedAttention, PagedSources, SourceLayout
from quiver_peft.base.sites import NO_ADAPTERS, Seam
from quiver_peft.base.t5 import T5Base
from quiver_peft.rounding import ceil_div

BLOCK_TOKENS = 16


@dataclass
class Row:
    """A prompt being decoded. index: of the prompt. blocks: its cache blocks; empty when it is not running."""

    index: int
    prompt: Sequence[int]
    blocks: list[int]
    generated: list[int] = field(default_factory=list[int])


class _Step:
    """Shared by both kinds of base: the KV cache and the adapter, in banks of its own."""

    def __init__(self, base: Base, weights: AdapterWeights | None, blocks_per_row: int, max_rows: int) -> None:
        self.device = base.embedding.weight.device
        self.num_prefix = 0 if weights is None else weights.num_prefix_tokens
        self.num_prompt = 0 if weights is None else weights.num_prompt_tokens
        self.kv = PagedKV(base.config, max_rows * blocks_per_row, BLOCK_TOKENS, base.compute_dtype, self.device)
        self._blocks_per_row = blocks_per_row
        self._banks = None if weights is None else AdapterBanks.for_one(weights, base.compute_dtype, self.device)

    def block_tables(self, max_rows: int) -> list[list[int]]:
        """Disjoint block tables for `max_rows` rows."""
        size = self._blocks_per_row
        return [list(range(i * size, (i + 1) * size)) for i in range(max_rows)]

    def seam(self, starts: Sequence[int], num_rows: int, first: int, last: int) -> Seam:
        """The adapter on a batch of `num_rows`, with its virtual tokens [first, last) where sequences start."""
        if self._banks is None:
            return NO_ADAPTERS
        virtual = [VirtualRows(FIRST_SLOT, row, row + last - first, first) for row in starts if last > first]
        return self._banks.seam([RowGroup(FIRST_SLOT, 0, num_rows)], virtual)


class GPTStep(_Step):
    """A decoding step of a GPT. New rows are prefilled: virtual tokens first, then the prompt."""

    def __init__(
        self, base: GPTBase, weights: AdapterWeights | None, longest: int, max_new_tokens: int, max_rows: int
    ) -> None:
        """longest: tokens of the longest prompt."""
        num_virtual = 0 if weights is None else weights.num_virtual_tokens
        super().__init__(base, weights, _num_blocks(longest + max_new_tokens + num_virtual), max_rows)
        self._base = base

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[int]:
        """The next token of each row."""
        num_virtual = self.num_prefix + self.num_prompt
        new = [[row.generated[-1]] if row.generated else [0] * num_virtual + list(row.prompt) for row in rows]
        lengths = [num_virtual + len(row.prompt) + len(row.generated) for row in rows]
        layout = PagedLayout([len(ids) for ids in new], lengths, [r.blocks for r in rows], BLOCK_TOKENS, self.device)
        tokens = torch.tensor([token for ids in new for token in ids], device=self.device)
        positions = torch.cat([torch.arange(end - len(ids), end) for ids, end in zip(new, lengths, strict=True)])
        starts, ends = _bounds(new)
        fresh = [start for start, row in zip(starts, rows, strict=True) if not row.generated]
        seam = self.seam(fresh, ends[-1], 0, num_virtual)
        hidden = self._base(tokens, positions.to(self.device), PagedAttention(self.kv, layout), seam)
        return self._base.logits(hidden[torch.tensor(ends, device=self.device) - 1]).argmax(-1).tolist()


class T5Step(_Step):
    """A decoding step of a T5. New rows are encoded first. A row's first blocks hold its source, others its target."""

    def __init__(
        self, base: T5Base, weights: AdapterWeights | None, longest: int, max_new_tokens: int, max_rows: int
    ) -> None:
        """longest: tokens of the longest source."""
        num_prefix = 0 if weights is None else weights.num_prefix_tokens
        num_prompt = 0 if weights is None else weights.num_prompt_tokens
        self._source_blocks = _num_blocks(longest + num_prompt)
        target_blocks = _num_blocks(num_prefix + 1 + max_new_tokens)
        super().__init__(base, weights, self._source_blocks + target_blocks, max_rows)
        self._base = base

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[int]:
        """The next token of each row."""
        base, start_token = self._base, self._base.config.start_token_id
        new = [[row.generated[-1]] if row.generated else [0] * self.num_prefix + [start_token] for row in rows]
        lengths = [self.num_prefix + 1 + len(row.generated) for row in rows]
        query_lengths = [len(ids) for ids in new]
        tables = [row.blocks[self._source_blocks :] for row in rows]
        layout = PagedLayout(query_lengths, lengths, tables, BLOCK_TOKENS, self.device)
        sources = self._read_sources(rows, query_lengths)
        tokens = torch.tensor([token for ids in new for token in ids], device=self.device)
        starts, ends = _bounds(new)
        fresh = [start for start, row in zip(starts, rows, strict=True) if not row.generated]
        seam = self.seam(fresh, ends[-1], 0, self.num_prefix)
        hidden = base(tokens, PagedAttention(self.kv, layout, base.decoder.bias.bias_for_offsets()), sources, seam)
        return base.logits(hidden[torch.tensor(ends, device=self.device) - 1]).argmax(-1).tolist()

    def _read_sources(self, rows: Sequence[Row], query_lengths: Sequence[int]) -> PagedSources:
        """The sources of all rows; those of new rows are encoded and stored now."""
        layout = SourceLayout(
            query_lengths,
            [self.num_prompt + len(row.prompt) for row in rows],
            [row.blocks[: self._source_blocks] for row in rows],
            [not row.generated for row in rows],
            BLOCK_TOKENS,
            self.device,
        )
        sources = PagedSources(self.kv, layout)
        new = [[0] * self.num_prompt + list(row.prompt) for row in rows if not row.generated]
        if new:
            starts, ends = _bounds(new)
            seam = self.seam(starts, ends[-1], self.num_prefix, self.num_prefix + self.num_prompt)
            tokens = torch.tensor([token for ids in new for token in ids], device=self.device)
            attend = PackedAttention([len(ids) for ids in new], self._base.encoder.bias.bias_for_offsets(), self.device)
            self._base.precompute_cross_kv(self._base.encode(tokens, attend, seam), sources, seam)
        return sources


def _num_blocks(num_tokens: int) -> int:
    return ceil_div(num_tokens, BLOCK_TOKENS)


def _bounds(parts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of the parts when concatenated."""
    ends = list(accumulate(len(part) for part in parts))
    return [end - len(part) for end, part in zip(ends, parts, strict=True)], ends
