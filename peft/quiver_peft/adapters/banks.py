"""All resident adapters, laid out for batched computation: slots, their memory, and the seam of one mixed batch."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quiver_peft.adapters.arena import Arena, Extent, aligned
from quiver_peft.adapters.artifact import AdapterWeights
from quiver_peft.adapters.lora import LoraWeights
from quiver_peft.base.sites import NO_ADAPTERS, Linear, Seam, Site
from quiver_peft.kernels.grouped_lora import LoraAtSite, LoraExpand, LoraSegment, add_grouped_lora_

BASE_SLOT = 0


class RowGroup(NamedTuple):
    """Rows [start, end) of a packed batch belong to the adapter in `slot`."""

    slot: int
    start: int
    end: int


class _Resident(NamedTuple):
    extent: Extent
    lora: dict[str, LoraAtSite]


class AdapterBanks:
    """Adapters in slots 1, 2, ...; slot 0 is the base. Thread-safe: adapters come and go beside the step loop.

    A slot may only be removed when no step uses it any more: the caller counts.
    """

    def __init__(self, capacity_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._arena = Arena(capacity_bytes, dtype, device)
        self._residents: dict[int, _Resident] = {}
        self._lock = threading.Lock()
        self._next_slot = BASE_SLOT + 1

    @property
    def capacity_bytes(self) -> int:
        """Adapter memory in all."""
        return self._arena.buffer.nbytes

    @property
    def free_bytes(self) -> int:
        """Adapter memory not in use."""
        with self._lock:
            return self._arena.free_bytes

    def num_bytes(self, weights: AdapterWeights) -> int:
        """What these weights would take."""
        return aligned(_num_elements(weights)) * self._arena.buffer.element_size()

    def insert(self, weights: AdapterWeights) -> int | None:
        """Copy an adapter in and return its slot, or None when there is no room for it now."""
        with self._lock:
            extent = self._arena.allocate(_num_elements(weights))
            if extent is None:
                return None
            slot = self._next_slot
            self._next_slot += 1
        # Outside of the lock: nobody else knows this extent yet, and the copy may take long.
        lora = _place_lora(weights.lora, self._arena.view(extent))
        self._residents[slot] = _Resident(extent, lora)
        return slot

    def remove(self, slot: int) -> int:
        """Give a slot's memory back and return how many bytes that is."""
        resident = self._residents.pop(slot)
        with self._lock:
            self._arena.free(resident.extent)
        return resident.extent.size * self._arena.buffer.element_size()

    def seam(self, groups: Sequence[RowGroup]) -> Seam:
        """The seam of a batch whose rows are grouped by slot; the bare base when no row has an adapter."""
        used = [(group, self._residents[group.slot]) for group in groups if group.slot != BASE_SLOT]
        return _BankSeam(used) if used else NO_ADAPTERS


class _BankSeam:
    """What the resident adapters do to the rows of one batch."""

    def __init__(self, used: Sequence[tuple[RowGroup, _Resident]]) -> None:
        self._lora: dict[str, list[LoraSegment]] = {}
        for group, resident in used:
            for site, lora in resident.lora.items():
                self._lora.setdefault(site, []).append(LoraSegment(group.start, group.end, lora))

    def embed(self, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        return embedding(tokens)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        y = linear(x)
        if segments := self._lora.get(linear.site.name):
            add_grouped_lora_(y, x, segments)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        return out


def _num_elements(weights: AdapterWeights) -> int:
    return sum(w.a.numel() + w.b.numel() for w in weights.lora)


def _place_lora(weights: Sequence[LoraWeights], memory: Tensor) -> dict[str, LoraAtSite]:
    """Copy LoRA weights into `memory` [elements] site by site: every A of a site, then every scaled Bᵀ."""
    by_site: dict[str, list[LoraWeights]] = {}
    for item in weights:
        by_site.setdefault(item.target.site, []).append(item)
    placed: dict[str, LoraAtSite] = {}
    offset = 0
    for site, items in by_site.items():
        num_ranks = sum(item.a.shape[0] for item in items)
        in_features = items[0].a.shape[1]
        a = memory[offset : offset + num_ranks * in_features].view(num_ranks, in_features)
        offset += a.numel()
        expands: list[LoraExpand] = []
        first = 0
        for item in items:
            num_rows, rank = item.b.shape
            b_t = memory[offset : offset + item.b.numel()].view(rank, num_rows)
            offset += b_t.numel()
            a[first : first + rank].copy_(item.a)
            b_t.copy_(item.b.T * item.scale)
            expands.append(LoraExpand((first, first + rank), *item.target.rows, b_t))
            first += rank
        placed[site] = LoraAtSite(a, tuple(expands))
    return placed
