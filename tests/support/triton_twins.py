"""What the tests of the Triton kernels share: an adapter memory to draw from, random groups of rows, tolerances."""

import math
import random

import torch
from torch import Tensor

from quiver_peft.kernels.triton.tiles import SMALL_BATCH_ROWS, Tiles, tiles_on

Group = tuple[int, int, int]


class FlatBuffer:
    """An adapter memory of random numbers, handed out from its start."""

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int = 100_000) -> None:
        self.buffer = (0.2 * torch.randn(size)).to(device, dtype)
        self._taken = 3  # nothing is aligned by chance

    def take(self, *shape: int) -> Tensor:
        """The next numbers, in this shape."""
        start, self._taken = self._taken, self._taken + math.prod(shape)
        return self.buffer[start : self._taken].view(shape)


def random_groups(num_rows: int, num_records: int, seed: int) -> list[Group]:
    """(record, start, end): adapters of one row, of a few and of many, with rows of the base between some of them."""
    draw = random.Random(seed)
    groups: list[Group] = []
    row = draw.choice([0, 1])
    while row < num_rows:
        end = min(row + draw.choice([1, 1, 3, SMALL_BATCH_ROWS, SMALL_BATCH_ROWS + 1, 20]), num_rows)
        groups.append((draw.randint(1, num_records), row, end))
        row = end + draw.choice([0, 0, 2])
    return groups


def make_tiles(groups: list[Group], num_rows: int, device: torch.device) -> Tiles:
    """On the device."""
    return tiles_on(device, groups, num_rows)


def assert_twins(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype`; the twin rounds to it more often than the kernel does."""
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert found.dtype == expected.dtype == dtype
    error = (found.float() - expected.float()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.float().abs().max().item()), error
