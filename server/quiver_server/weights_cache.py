"""Adapters that were read and validated already, kept in main memory so that loading one again is a copy."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapter_entry import FilesState, files_state

_BYTES_PER_PARAMETER = 4  # AdapterWeights are fp32


class _Kept(NamedTuple):
    state: FilesState
    weights: AdapterWeights
    num_bytes: int


class WeightsCache:
    """Reads folders, the same content once while it is kept. The least recently used go when it is full.

    What is kept counts only while the folder's files are still the ones that were read. read: reads and validates a
    folder; raises AdapterError. Used by one thread, the loader's; `bytes_of` by any.
    """

    def __init__(self, read: Callable[[Path], AdapterWeights], capacity_bytes: int) -> None:
        self._read = read
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[Path, _Kept] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0

    def read(self, folder: Path) -> AdapterWeights:
        """The folder's weights as it is now."""
        state = files_state(folder)  # first: what is replaced while it is read must not count as what is there then
        kept = self._kept.get(folder)
        if kept is not None and kept.state == state:
            self._kept.move_to_end(folder)
            self.num_hits += 1
            return kept.weights
        self._drop(folder)
        weights = self._read(folder)
        self._keep(folder, _Kept(state, weights, weights.num_parameters * _BYTES_PER_PARAMETER))
        return weights

    def bytes_of(self, folder: Path) -> int:
        """Main memory that this folder's weights take here."""
        kept = self._kept.get(folder)
        return 0 if kept is None else kept.num_bytes

    def _keep(self, folder: Path, new: _Kept) -> None:
        if new.num_bytes > self._capacity_bytes:
            return
        while self.num_bytes + new.num_bytes > self._capacity_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[folder] = new
        self.num_bytes += new.num_bytes

    def _drop(self, folder: Path) -> None:
        kept = self._kept.pop(folder, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes
