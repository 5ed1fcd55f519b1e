"""The adapters in memory: slots, the memory they share, and the seam of a batch that mixes them."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from quiver_peft.adapters.serving.arena import Arena, Extent, aligned
from quiver_peft.adapters.serving.cpp_seam import CppDescriptor, CppSeam, SiteIndex, cpp_descriptor
from quiver_peft.adapters.serving.placement import ResidentWeights, copy_weights, num_elements
from quiver_peft.adapters.serving.slot_tables import SlotTables, TableRow
from quiver_peft.adapters.serving.torch_seam import RowGroup, TorchSeam, VirtualRows
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.sites import NO_ADAPTERS, Seam
from quiver_peft.kernels.cpp.library import library_for

BASE_SLOT = 0
FIRST_SLOT = 1


class _Resident(NamedTuple):
    extent: Extent
    weights: ResidentWeights
    row: TableRow | None  # where there are tables
    descriptor: CppDescriptor | None  # None without compiled kernels


class AdapterBanks:
    """Adapters in slots 1, 2, ...; slot 0 is the base. Thread-safe: adapters come and go beside the step loop.

    A slot may only be removed when no step uses it any more: the caller counts.
    """

    def __init__(
        self, capacity_bytes: int, dtype: torch.dtype, device: torch.device, tables: SlotTables | None = None
    ) -> None:
        """tables: for the kernels of the device; without, every adapter's part of a batch is computed by itself."""
        self._arena = Arena(capacity_bytes, dtype, device)
        self._tables = tables
        # Loads go beside the steps on the device too.
        self._loading = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._residents: dict[int, _Resident] = {}
        self._sites = SiteIndex()  # for the compiled kernels
        self._lock = threading.Lock()
        self._next_slot = FIRST_SLOT
        self._last_seam: tuple[list[RowGroup], Seam] = ([], NO_ADAPTERS)

    @classmethod
    def for_one(cls, weights: AdapterWeights, dtype: torch.dtype, device: torch.device) -> "AdapterBanks":
        """Banks that hold exactly one adapter, in `FIRST_SLOT`."""
        banks = cls(aligned(num_elements(weights)) * dtype.itemsize, dtype, device)
        slot = banks.insert(weights)
        assert slot == FIRST_SLOT
        return banks

    @property
    def capacity_bytes(self) -> int:
        """Adapter memory in all."""
        return self._arena.buffer.nbytes

    @property
    def free_bytes(self) -> int:
        """Adapter memory not in use."""
        with self._lock:
            return self._arena.free_bytes

    def occupied(self) -> dict[int, tuple[int, int]]:
        """The bytes [start, end) of the adapter memory that each slot takes."""
        size = self._arena.buffer.element_size()
        extents = {slot: resident.extent for slot, resident in list(self._residents.items())}
        return {slot: (it.start * size, (it.start + it.size) * size) for slot, it in extents.items()}

    def num_bytes(self, weights: AdapterWeights) -> int:
        """What these weights would take."""
        return aligned(num_elements(weights)) * self._arena.buffer.element_size()

    def insert(self, weights: AdapterWeights) -> int | None:
        """Copy an adapter in and return its slot, or None when there is no room for it now."""
        with self._lock:
            extent = self._arena.allocate(num_elements(weights))
        if extent is None:
            return None
        resident = None
        try:
            # Outside of the lock: nobody else knows this extent yet, and the copy may take long.
            resident = self._copy(weights, extent)
        finally:
            if resident is None:
                with self._lock:
                    self._arena.free(extent)
        if resident is None:
            return None
        with self._lock:
            slot = self._next_slot
            self._next_slot += 1
            self._residents[slot] = resident
        return slot

    def _copy(self, weights: AdapterWeights, extent: Extent) -> _Resident | None:
        """None when the tables are full."""
        with nullcontext() if self._loading is None else torch.cuda.stream(self._loading):
            placed = copy_weights(weights, self._arena.view(extent))
            row = None if self._tables is None else self._tables.insert(placed)
        if self._loading is not None:
            self._loading.synchronize()
        is_full = self._tables is not None and row is None
        if is_full:
            return None
        with self._lock:
            record = cpp_descriptor(placed, self._sites) if self._has_cpp_kernels() else None
        return _Resident(extent, placed, row, record)

    def _has_cpp_kernels(self) -> bool:
        with torch.no_grad():
            return library_for(self._arena.buffer) is not None

    def remove(self, slot: int) -> int:
        """Give a slot's memory back and return how many bytes that is."""
        resident = self._residents.pop(slot)
        with self._lock:
            self._arena.free(resident.extent)
        if self._tables is not None and resident.row is not None:
            self._tables.remove(resident.row)
        return resident.extent.size * self._arena.buffer.element_size()

    def seam(self, groups: Sequence[RowGroup], virtual: Sequence[VirtualRows] = ()) -> Seam:
        """The seam of a batch whose rows are grouped by slot; the bare base when no row has an adapter.

        virtual: which of these rows are virtual tokens.
        """
        if not virtual and self._last_seam[0] == groups:
            # Decoding mostly goes on with the batch of the step before. Slots are never given out twice.
            return self._last_seam[1]
        used = [(group, self._residents[group.slot]) for group in groups if group.slot != BASE_SLOT]
        rows = [(item, self._residents[item.slot].weights) for item in virtual]
        seam: Seam = NO_ADAPTERS
        if used and self._tables is not None:
            seam = self._triton_seam(groups, self._tables, TorchSeam((), rows))
        elif used:
            seam = self._host_seam(used, rows)
        if not virtual:
            self._last_seam = (list(groups), seam)
        return seam

    def _host_seam(
        self, used: Sequence[tuple[RowGroup, _Resident]], rows: Sequence[tuple[VirtualRows, ResidentWeights]]
    ) -> Seam:
        described = [(group.start, group.end, it.descriptor) for group, it in used if it.descriptor is not None]
        if len(described) < len(used):
            return TorchSeam([(group, it.weights) for group, it in used], rows)
        return CppSeam(described, self._sites, TorchSeam((), rows) if rows else None)

    def _triton_seam(self, groups: Sequence[RowGroup], tables: SlotTables, virtual: TorchSeam) -> Seam:
        # Here, because it needs Triton, which comes with torch for a GPU.
        from quiver_peft.adapters.serving.triton_seam import TableRowRange, TritonSeam

        rows: list[TableRowRange] = []
        for slot, start, end in groups:
            if slot != BASE_SLOT and (row := self._residents[slot].row) is not None:
                rows.append(TableRowRange(row, start, end))
        return TritonSeam(self._arena.buffer, tables, rows, groups[-1].end, virtual)
