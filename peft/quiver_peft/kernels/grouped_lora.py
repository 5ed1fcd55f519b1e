"""LoRA of many adapters on one packed batch: rows are grouped by adapter, weights are read where they lie."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LoraExpand(NamedTuple):
    """One target's second factor: outputs [start, end) gain (x Aᵀ)[ranks] @ b_t.

    ranks: [first, end) rows of the site's A. b_t: [R, end - start], already scaled.
    """

    ranks: tuple[int, int]
    start: int
    end: int
    b_t: Tensor


class LoraAtSite(NamedTuple):
    """One adapter's LoRA at one site. a: [sum of R, K], the ranks of all its targets there, one after the other."""

    a: Tensor
    expands: tuple[LoraExpand, ...]


class LoraSegment(NamedTuple):
    """Rows [start, end) of the batch use `lora`."""

    start: int
    end: int
    lora: LoraAtSite


def add_grouped_lora_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> None:
    """y[rows] += scale · (x[rows] Aᵀ) Bᵀ for each segment, in place. x: [T, K], y: [T, N]."""
    for segment in segments:
        low = x[segment.start : segment.end] @ segment.lora.a.T
        rows = y[segment.start : segment.end]
        for expand in segment.lora.expands:
            rows[:, expand.start : expand.end].addmm_(low[:, expand.ranks[0] : expand.ranks[1]], expand.b_t)
