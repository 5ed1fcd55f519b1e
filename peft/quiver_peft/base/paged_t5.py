"""T5 in the paged cache: sources packed without padding through the encoder, their keys and values kept in blocks."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from quiver_peft.base.paged import PagedKV, attend_chunk, attend_singles, cache_rows, pad_singles
from quiver_peft.base.t5_attention import RelativeBias


class PackedAttention:
    """The encoder's attention: sources follow one another in T rows, and each sees itself alone.

    lengths: tokens of each source.
    """

    def __init__(self, lengths: Sequence[int], bias: RelativeBias, device: torch.device) -> None:
        ends = list(accumulate(lengths))
        self._rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        positions = torch.arange(max(lengths), device=device)
        # [H, S, S] of the longest; a shorter source has the same distances in its corner.
        self._scores = bias(positions - positions[:, None])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [T, H, E] -> [T, H, E]."""
        out = torch.empty_like(q)
        for rows in self._rows:
            length = rows.stop - rows.start
            scores = self._scores[:, :length, :length]
            out[rows] = attend_chunk(q[rows], k[rows], v[rows], scores, causal=False, scale=1.0)
        return out


class SourceLayout:
    """Where the sources of one step lie, and which rows of the decoder's batch attend to which.

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
        new_rows: list[Tensor] = []
        singles: list[tuple[int, Tensor]] = []
        self.chunks: list[tuple[slice, Tensor]] = []
        row = 0
        for num_rows, length, table, new in zip(query_lengths, source_lengths, block_tables, is_new, strict=True):
            cached = cache_rows(table, length, block_size)
            if new:
                new_rows.append(cached)
            if num_rows == 1:
                singles.append((row, cached))
            else:
                self.chunks.append((slice(row, row + num_rows), cached.to(device)))
            row += num_rows
        self.new_rows = torch.cat(new_rows).to(device) if new_rows else None
        self.singles = pad_singles(singles, device) if singles else None


class PagedSources:
    """Sources in the paged cache, which has one place for each token and layer, whatever attends to it."""

    def __init__(self, kv: PagedKV, layout: SourceLayout) -> None:
        self._kv = kv
        self._layout = layout

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Those of the new sources, in order. k, v: [T, H, E]."""
        assert self._layout.new_rows is not None
        self._kv.keys[layer][self._layout.new_rows] = k
        self._kv.values[layer][self._layout.new_rows] = v

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, H, E], rows of the decoder's batch -> [T, H, E]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        out = torch.empty_like(q)
        for rows, cached in self._layout.chunks:
            out[rows] = attend_chunk(q[rows], keys[cached], values[cached], None, causal=False, scale=1.0)
        if (singles := self._layout.singles) is not None:
            cached = singles.cached
            out[singles.rows] = attend_singles(q[singles.rows], keys[cached], values[cached], singles.mask, scale=1.0)
        return out
