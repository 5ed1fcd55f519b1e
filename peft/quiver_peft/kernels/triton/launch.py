"""Launch parameters of the grouped kernels: dot type, split-K, and tile sizes for small and large batches."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quiver_peft.kernels.triton.tiles import LARGE_BATCH_TILE, SMALL_BATCH_TILE, Tiles
from quiver_peft.rounding import ceil_div

# The fewest inputs that a split of K sums. Splits depend on the linear's size alone, which keeps rows batch-invariant.
MIN_SPLIT_INPUTS = 512
MAX_SPLITS = 16
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The tensors' own type, with fp32 sums. The interpreter, whose numpy knows no bfloat16, multiplies in fp32."""
    return tl.float32 if knobs.runtime.interpret else _TYPES[dtype]


def split_k(num_inputs: int) -> tuple[int, int]:
    """Split-K: (inputs per plane of partial sums, number of planes)."""
    fewest = min(MAX_SPLITS, ceil_div(num_inputs, MIN_SPLIT_INPUTS))
    plane = max(16, int(triton.next_power_of_2(ceil_div(num_inputs, fewest))))  # the least K of tl.dot
    return plane, ceil_div(num_inputs, plane)


def batch_regimes(tiles: Tiles, dtype: torch.dtype) -> list[tuple[Tensor, dict[str, Any]]]:
    """The tiles of each non-empty regime (small, large batch) and the sizes that its kernels are compiled for."""
    both = (
        (tiles.few, {"BLOCK_M": SMALL_BATCH_TILE, "BLOCK_R": 8, "DOT": False}),
        (tiles.many, {"BLOCK_M": LARGE_BATCH_TILE, "BLOCK_R": 16, "DOT": True}),
    )
    return [(part, {**sizes, "DOT_TYPE": dot_type(dtype)}) for part, sizes in both if len(part)]
