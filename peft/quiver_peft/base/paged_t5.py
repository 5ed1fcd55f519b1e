"""T5 with the paged KV cache: packed encoder attention, and cross-attention keys and values in cache blocks."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from quiver_peft.base.paged import PagedKV
from quiver_peft.kernels.paged_attention import paged_attention, write_kv
from quiver_peft.kernels.paged_layout import PagedLayout


class PackedAttention:
    """The encoder's attention: sources follow one another in T rows, and each sees itself alone.

    lengths: tokens of each source. bias: by distance (`RelativeBias.bias_for_offsets`).
    """

    def __init__(self, lengths: Sequence[int], bias: Tensor, device: torch.device) -> None:
        # The rows themselves are the cache: blocks of one token.
        tables = [range(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
        self.layout = PagedLayout(lengths, lengths, tables, 1, device)
        self._bias = bias

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [T, H, E] -> [T, H, E]."""
        return paged_attention(q, k, v, self.layout, scale=1.0, causal=False, bias=self._bias)


class SourceLayout:
    """The cache blocks of a step's sources, and which rows of the decoder's batch attend to which source.

    A source is what the encoder made of one request's input: as many tokens in the cache as the input has.
    """

    def __init__(
        self,
        query_lengths: Sequence[int],
        source_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        is_new: Sequence[bool],
        block_size: int,
        device: torch.device,
    ) -> None:
        """For each sequence: rows in the decoder's batch, tokens of its source, and whether it comes in this step."""
        self.attended = PagedLayout(query_lengths, source_lengths, block_tables, block_size, device)
        new = [
            (length, table)
            for length, table, is_new_source in zip(source_lengths, block_tables, is_new, strict=True)
            if is_new_source
        ]
        lengths = [length for length, _ in new]
        self.new_rows = (
            PagedLayout(lengths, lengths, [table for _, table in new], block_size, device).new_rows if new else None
        )


class PagedSources:
    """Cross-attention keys and values in the paged cache."""

    def __init__(self, kv: PagedKV, layout: SourceLayout) -> None:
        self._kv = kv
        self._layout = layout

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the new sources' keys and values, in order. k, v: [T, H, E]."""
        assert self._layout.new_rows is not None
        write_kv(self._kv.keys[layer], self._kv.values[layer], k, v, self._layout.new_rows)

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, H, E], rows of the decoder's batch -> [T, H, E]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        return paged_attention(q, keys, values, self._layout.attended, scale=1.0, causal=False)
