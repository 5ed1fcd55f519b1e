"""The adapter memory: one flat buffer, handed out in extents of exactly the size each adapter needs."""

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_peft.kernels.huge_pages import empty_huge
from quiver_peft.rounding import round_up

# Extents start on a cache line (and on what vectorised loads like): 64 bytes of fp32.
ALIGNMENT_ELEMENTS = 16


@dataclass(frozen=True)
class Extent:
    """Elements [start, start + size) of the arena."""

    start: int
    size: int


def aligned(num_elements: int) -> int:
    """The size of the extent that `num_elements` get."""
    return round_up(num_elements, ALIGNMENT_ELEMENTS)


class Arena:
    """First-fit allocation over one tensor that never moves, so that kernels and graphs may keep its address."""

    def __init__(self, capacity_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = empty_huge([capacity_bytes // dtype.itemsize], dtype, device)
        self._free = [Extent(0, self.buffer.numel())]

    @property
    def free_bytes(self) -> int:
        """The sum of all gaps; an allocation may still fail when no single gap is large enough."""
        return sum(extent.size for extent in self._free) * self.buffer.element_size()

    def allocate(self, num_elements: int) -> Extent | None:
        """An extent of at least `num_elements`, or None when no gap is large enough."""
        size = aligned(num_elements)
        for index, gap in enumerate(self._free):
            if gap.size >= size:
                rest = Extent(gap.start + size, gap.size - size)
                self._free[index : index + 1] = [rest] if rest.size else []
                return Extent(gap.start, size)
        return None

    def free(self, extent: Extent) -> None:
        """Give an extent back; neighbouring gaps melt together."""
        index = bisect.bisect(self._free, extent.start, key=lambda gap: gap.start)
        start, end = extent.start, extent.start + extent.size
        if index < len(self._free) and self._free[index].start == end:
            end += self._free.pop(index).size
        if index and self._free[index - 1].start + self._free[index - 1].size == start:
            index -= 1
            start = self._free.pop(index).start
        self._free.insert(index, Extent(start, end - start))

    def view(self, extent: Extent) -> Tensor:
        """The extent's elements, [size]."""
        return self.buffer[extent.start : extent.start + extent.size]
