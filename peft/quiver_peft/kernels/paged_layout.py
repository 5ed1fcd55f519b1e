"""`PagedLayout`: the block tables and sequence lengths of one step, for paged attention.

B sequences follow one another in T packed rows.
"""

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from quiver_peft.kernels.pinned_upload import PinnedUpload
from quiver_peft.rounding import ceil_div


class PagedLayout:
    """The cache rows of one step's new tokens and of the contexts that they attend to; the same for all layers.

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
        to: torch.device | PinnedUpload,
    ) -> None:
        """query_lengths: new tokens of each sequence. A table may be longer than its sequence needs.

        to: the device, or an upload that the caller sends before anything is read.
        """
        self.block_size = block_size
        self.query_lengths = list(query_lengths)
        self.lengths = list(context_lengths)
        size = len(self.lengths)
        width = ceil_div(max(self.lengths), block_size)
        tables = np.zeros((size, width), np.int32)
        for row, _, length, table in zip(tables, query_lengths, context_lengths, block_tables, strict=True):
            needed = table[: ceil_div(length, block_size)]
            row[: len(needed)] = needed
        transfer = to if isinstance(to, PinnedUpload) else PinnedUpload(to)
        self._query_starts = transfer.add([0, *accumulate(query_lengths)])
        self._context_lengths = transfer.add(self.lengths)
        self._tables = transfer.add(tables.ravel())
        self._host_tables = tables
        self._new_rows = None
        if transfer is to:
            self._new_rows = transfer.add(_new_rows(self.query_lengths, self.lengths, tables, block_size))
        else:
            transfer.send()

    @cached_property
    def query_starts(self) -> Tensor:
        """[B + 1] int32."""
        return self._query_starts()

    @cached_property
    def context_lengths(self) -> Tensor:
        """[B] int32."""
        return self._context_lengths()

    @cached_property
    def tables(self) -> Tensor:
        """[B, blocks of the longest] int32."""
        return self._tables().view(self._host_tables.shape)

    @cached_property
    def new_rows(self) -> Tensor:
        """The cache rows of the step's new tokens, [T] int64.

        Undefined for cross-attention, where a source may be shorter than the rows that attend to it.
        """
        if self._new_rows is not None:
            return self._new_rows().long()
        rows = _new_rows(self.query_lengths, self.lengths, self._host_tables, self.block_size)
        return torch.from_numpy(rows).to(self.tables.device)

    @cached_property
    def address(self) -> int:
        """Address of struct Layout of layout.h, for the compiled kernels, valid as long as this object lives."""
        tables, starts, lengths = self.tables, self.query_starts, self.context_lengths
        self._described = array(
            "q",
            (
                tables.data_ptr(), tables.stride(0), starts.data_ptr(), lengths.data_ptr(), len(lengths),
                self.block_size,
            ),
        )  # fmt: skip
        return self._described.buffer_info()[0]

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
