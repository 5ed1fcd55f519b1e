"""Attention of packed rows to keys and values in cache blocks: where they lie, and the plain torch form.

B sequences follow one another in T packed rows; the other letters are those of `base/layers.py`.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class PagedLayout:
    """Where the rows of one step and what they attend to lie; the same for all layers. One copy to the device.

    query_starts: [B + 1] int32, rows [query_starts[b], query_starts[b + 1]) are the newest tokens of sequence b.
    context_lengths: [B] int32, tokens of each sequence, the new ones included.
    tables: [B, blocks of the longest] int32; token i of a sequence is cache row
        tables[b, i // block_size] · block_size + i % block_size.
    """

    def __init__(
        self,
        query_lengths: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> None:
        """query_lengths: new tokens of each sequence. A table may be longer than its sequence needs."""
        self.block_size = block_size
        self.query_lengths = list(query_lengths)
        self.lengths = list(context_lengths)
        size = len(self.lengths)
        width = -(-max(self.lengths) // block_size)
        packed = np.zeros(size * (width + 2) + 1, np.int32)
        packed[1 : size + 1] = list(accumulate(query_lengths))
        packed[size + 1 : 2 * size + 1] = self.lengths
        tables = packed[2 * size + 1 :].reshape(size, width)
        for row, _, length, table in zip(tables, query_lengths, context_lengths, block_tables, strict=True):
            needed = table[: -(-length // block_size)]
            row[: len(needed)] = needed
        on_device = torch.from_numpy(packed).to(device)
        self.query_starts = on_device[: size + 1]
        self.context_lengths = on_device[size + 1 : 2 * size + 1]
        self.tables = on_device[2 * size + 1 :].view(size, width)
        self._tables = tables

    @cached_property
    def new_rows(self) -> Tensor:
        """The cache rows of the batch's own tokens, [T] int64.

        Not for a source, which may be shorter than the rows that attend to it.
        """
        rows = _new_rows(self.query_lengths, self.lengths, self._tables, self.block_size)
        return torch.from_numpy(rows).to(self.tables.device)

    def cache_rows(self, sequence: int) -> Tensor:
        """The cache rows of all tokens of a sequence, [S] int64."""
        offsets = torch.arange(self.block_size, device=self.tables.device)
        rows = self.tables[sequence].long()[:, None] * self.block_size + offsets
        return rows.flatten()[: self.lengths[sequence]]


def _new_rows(query_lengths: Sequence[int], lengths: Sequence[int], tables: np.ndarray, block_size: int) -> np.ndarray:
    counts, ends = np.asarray(query_lengths), np.asarray(lengths)
    sequence = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(sequence)) + (ends - np.cumsum(counts))[sequence]
    return tables[sequence, position // block_size].astype(np.int64) * block_size + position % block_size


def store_rows(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Put new keys and values into a layer's cache. keys, values: [C, G, E]; k, v: [T, G, E]; rows: [T] int64."""
    keys[rows] = k
    values[rows] = v


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v of each row over its own sequence in the cache. q: [T, H, E] -> [T, H, E].

    keys, values: [C, G, E], one layer's cache.
    causal: a row sees itself and what is before it; else its whole sequence.
    window: it looks back so many tokens, itself included; only with `causal`.
    bias: [H, 2 · limit + 1] fp32, added to the scores; column limit + d is for keys d positions after the query,
    those farther than `limit` take the outermost columns.
    """
    return paged_attention_torch(q, keys, values, layout, scale, causal, window, bias)


def paged_attention_torch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PagedLayout,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """The plain form: one sequence after the other."""
    out = torch.empty_like(q)
    row = 0
    for sequence, (num_new, length) in enumerate(zip(layout.query_lengths, layout.lengths, strict=True)):
        cached = layout.cache_rows(sequence)
        rows = slice(row, row + num_new)
        mask = _mask(num_new, length, causal, window, bias, q)
        k, v = (part[cached].transpose(0, 1)[None] for part in (keys, values))
        # Query heads that share a key-value head stand together, which is what enable_gqa means.
        attended = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1]
        )
        out[rows] = attended[0].transpose(0, 1)
        row += num_new
    return out


def _mask(
    num_new: int, length: int, causal: bool, window: int | None, bias: Tensor | None, like: Tensor
) -> Tensor | None:
    """What the newest rows of a sequence see: [N, S] bool, or scores to add, [H, N, S]; None: everything."""
    if bias is None and window is None and (not causal or num_new == 1):
        return None
    positions = torch.arange(length, device=like.device)
    distances = positions - positions[length - num_new :, None]
    hidden = distances > 0 if causal else torch.zeros_like(distances, dtype=torch.bool)
    if window is not None:
        hidden |= distances <= -window
    if bias is None:
        return ~hidden
    limit = bias.shape[1] // 2
    scores = bias[:, distances.clamp(-limit, limit) + limit]
    return scores.masked_fill(hidden, -torch.inf).to(like.dtype)
