"""Where the rows of a step and the keys and values that they attend to lie in cache blocks.

B sequences follow one another in T packed rows.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
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
