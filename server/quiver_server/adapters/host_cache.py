"""Adapters that were read and validated already, kept in main memory so that loading one again is a copy."""

from collections import OrderedDict

from quiver_peft.adapters.weights import AdapterWeights

_BYTES_PER_PARAMETER = 4  # AdapterWeights are fp32


class HostCache:
    """Weights by revision. The least recently used go when it is full.

    Used by one thread, the loader's; `bytes_of` by any.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._kept: OrderedDict[str, AdapterWeights] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0

    def get(self, revision: str) -> AdapterWeights | None:
        """The weights of a revision, where they are kept."""
        weights = self._kept.get(revision)
        if weights is not None:
            self._kept.move_to_end(revision)
            self.num_hits += 1
        return weights

    def put(self, weights: AdapterWeights) -> None:
        """Keep them, unless they are larger than all that there is room for."""
        num_bytes = size_of(weights)
        if num_bytes > self.capacity_bytes or weights.revision in self._kept:
            return
        while self.num_bytes + num_bytes > self.capacity_bytes:
            self.drop(next(iter(self._kept)))
        self._kept[weights.revision] = weights
        self.num_bytes += num_bytes

    def drop(self, revision: str) -> int:
        """Forget a revision; returns the bytes given back."""
        weights = self._kept.pop(revision, None)
        num_bytes = 0 if weights is None else size_of(weights)
        self.num_bytes -= num_bytes
        return num_bytes

    def bytes_of(self, revision: str) -> int:
        """Main memory that a revision's weights take here."""
        weights = self._kept.get(revision)
        return 0 if weights is None else size_of(weights)


def size_of(weights: AdapterWeights) -> int:
    """Bytes that weights take in main memory."""
    return weights.num_parameters * _BYTES_PER_PARAMETER
