"""`Tiles`: which rows of a batch belong to which adapter, as the Triton kernels read it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Up to SMALL_BATCH_ROWS rows of an adapter are multiplied row by row while weights stream past; more use `tl.dot`.
SMALL_BATCH_ROWS = 8
SMALL_BATCH_TILE = 4
LARGE_BATCH_TILE = 16
_FIELDS = 3


class Tiles(NamedTuple):
    """Rows [first, first + count) read the records in row `record` of the tables.

    few, many: [n, 3] int32, (record, first, count) of the tiles of either regime.
    records: [T] int32, the record of each row; 0 is the base's, which changes nothing.
    """

    few: Tensor
    many: Tensor
    records: Tensor


def pack_tiles(groups: Sequence[tuple[int, int, int]], num_rows: int) -> tuple[np.ndarray, int, int]:
    """Tiles as one int32 array, and how many there are of few and of many rows. groups: (record, start, end), not 0."""
    few: list[int] = []
    many: list[int] = []
    records = np.zeros(num_rows, np.int32)
    for record, start, end in groups:
        records[start:end] = record
        is_few = end - start <= SMALL_BATCH_ROWS
        size = SMALL_BATCH_TILE if is_few else LARGE_BATCH_TILE
        for first in range(start, end, size):
            (few if is_few else many).extend((record, first, min(size, end - first)))
    packed = np.concatenate([np.array(few + many, np.int32), records])
    return packed, len(few) // _FIELDS, len(many) // _FIELDS


def unpack_tiles(packed: Tensor, num_few: int, num_many: int) -> Tiles:
    """packed: what `pack_tiles` made, on the device."""
    split, end = _FIELDS * num_few, _FIELDS * (num_few + num_many)
    return Tiles(packed[:split].view(-1, _FIELDS), packed[split:end].view(-1, _FIELDS), packed[end:])


def tiles_on(device: torch.device, groups: Sequence[tuple[int, int, int]], num_rows: int) -> Tiles:
    """Tiles on the device, by a copy of their own."""
    packed, num_few, num_many = pack_tiles(groups, num_rows)
    return unpack_tiles(torch.from_numpy(packed).to(device), num_few, num_many)
