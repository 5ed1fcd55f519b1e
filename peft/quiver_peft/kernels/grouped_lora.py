"""Grouped LoRA: many adapters on one packed batch whose rows are grouped by adapter; weights are read in place."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from quiver_peft.kernels.cpp.groups import AdapterGroups, RowRange, SiteDescriptors
from quiver_peft.kernels.cpp.library import library_for


class LoraExpand(NamedTuple):
    """One target's second factor: outputs [start, end) gain (x Aᵀ)[ranks] @ b_t.

    ranks: [first, end) rows of the site's A. b_t: [R, end - start], already scaled.
    """

    ranks: tuple[int, int]
    start: int
    end: int
    b_t: Tensor


@dataclass(frozen=True)
class LoraAtSite:
    """One adapter's LoRA at one site. a: [sum of R, K], the ranks of all its targets there, one after the other."""

    a: Tensor
    expands: tuple[LoraExpand, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether every factor is contiguous, as the compiled kernel requires."""
        return self.a.is_contiguous() and all(expand.b_t.is_contiguous() for expand in self.expands)

    @cached_property
    def descriptor(self) -> "array[int]":
        """Struct Lora of lora.cpp, for the compiled kernel. All factors must be contiguous."""
        assert self.is_contiguous
        words = [self.a.data_ptr(), self.a.shape[0], len(self.expands)]
        for expand in self.expands:
            words += [*expand.ranks, expand.start, expand.end, expand.b_t.data_ptr()]
        return array("q", words)


class LoraSegment(NamedTuple):
    """Rows [start, end) of the batch use `lora`."""

    start: int
    end: int
    lora: LoraAtSite


def add_grouped_lora_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> None:
    """y[rows] += scale · (x[rows] Aᵀ) Bᵀ for each segment, in place. x: [T, K], y: [T, N].

    Batch-invariant with the compiled kernel: a row's result does not depend on the other rows, bit for bit.
    """
    if not segments:
        return
    groups = None if library_for(y, x, segments[0].lora.a) is None else _as_groups(segments)
    if groups is None or y.stride(1) != 1 or x.stride(1) != 1:
        add_grouped_lora_torch_(y, x, segments)
    else:
        add_lora_of_groups_(y, x, groups, 0)


def _as_groups(segments: Sequence[LoraSegment]) -> AdapterGroups | None:
    """The segments as groups with site number 0. None if the compiled kernel cannot take them."""
    groups: list[RowRange] = []
    for segment in segments:
        if not segment.lora.is_contiguous or (groups and groups[-1].end > segment.start):
            return None
        groups.append(RowRange(segment.start, segment.end, SiteDescriptors.of({0: segment.lora.descriptor})))
    return AdapterGroups(groups)


def add_lora_of_groups_(y: Tensor, x: Tensor, groups: AdapterGroups, site: int) -> None:
    """`add_grouped_lora_` by the compiled kernel. site: the site's number in the groups' descriptors."""
    cpp = library_for(y, x)
    assert cpp is not None and y.stride(1) == x.stride(1) == 1
    cpp.add_lora(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], groups.address, site)


def add_grouped_lora_torch_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> None:
    """`add_grouped_lora_` by torch's operators."""
    for segment in segments:
        low = x[segment.start : segment.end] @ segment.lora.a.T
        rows = y[segment.start : segment.end]
        for expand in segment.lora.expands:
            rows[:, expand.start : expand.end].addmm_(low[:, expand.ranks[0] : expand.ranks[1]], expand.b_t)
