"""LoRA of many adapters on one packed batch: rows are grouped by adapter, weights are read where they lie."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from quiver_peft.kernels.native.library import library_for


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

    @cached_property
    def descriptor(self) -> "array[int] | None":
        """The same for the compiled kernel, struct Lora of lora.cpp; None when the factors do not lie in one piece."""
        words = [self.a.data_ptr(), self.a.shape[0], len(self.expands)]
        for expand in self.expands:
            words += [*expand.ranks, expand.start, expand.end, expand.b_t.data_ptr()]
        factors = (self.a, *(expand.b_t for expand in self.expands))
        return array("q", words) if all(factor.is_contiguous() for factor in factors) else None

    @cached_property
    def address(self) -> int:
        """Where the descriptor lies, as long as this object lives; 0 when there is none."""
        return 0 if self.descriptor is None else self.descriptor.buffer_info()[0]


class LoraSegment(NamedTuple):
    """Rows [start, end) of the batch use `lora`."""

    start: int
    end: int
    lora: LoraAtSite


class LoraSegments(tuple[LoraSegment, ...]):
    """The segments of one site in one batch, kept from step to step while the batch stays the same."""

    @cached_property
    def table(self) -> "array[int] | None":
        """For the compiled kernel: start, end and address of each; None when it cannot take them."""
        addresses = [segment.lora.address for segment in self]
        if not all(addresses) or any(after.start < before.end for before, after in pairwise(self)):
            return None
        return array(
            "q", [word for s, address in zip(self, addresses, strict=True) for word in (s.start, s.end, address)]
        )


def add_grouped_lora_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> None:
    """y[rows] += scale · (x[rows] Aᵀ) Bᵀ for each segment, in place. x: [T, K], y: [T, N].

    By the compiled kernel a row's result is the same bits whatever the other rows are.
    """
    if not segments:
        return
    native = library_for(y, x, segments[0].lora.a)
    if native is not None and y.stride(1) == 1 and x.stride(1) == 1:
        table = (segments if isinstance(segments, LoraSegments) else LoraSegments(segments)).table
        if table is not None:
            address = table.buffer_info()[0]
            native.add_lora(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], address, len(segments))
            return
    add_grouped_lora_torch_(y, x, segments)


def add_grouped_lora_torch_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> None:
    """The plain form."""
    for segment in segments:
        low = x[segment.start : segment.end] @ segment.lora.a.T
        rows = y[segment.start : segment.end]
        for expand in segment.lora.expands:
            rows[:, expand.start : expand.end].addmm_(low[:, expand.ranks[0] : expand.ranks[1]], expand.b_t)
