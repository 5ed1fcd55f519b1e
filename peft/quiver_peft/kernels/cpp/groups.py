"""What the compiled kernels are told of the adapters in a step: whose rows are whose, and what each does where."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple


class SiteDescriptors(NamedTuple):
    """Of one adapter. addresses: of its record at each site, by number, or 0. kept: the records."""

    addresses: "array[int]"
    kept: "Sequence[array[int]]"

    @classmethod
    def of(cls, records: "dict[int, array[int]]") -> "SiteDescriptors":
        """From the records by the sites' numbers."""
        size = 1 + max(records, default=-1)
        addresses = array("q", [size] + [0] * size)
        for site, record in records.items():
            addresses[1 + site] = record.buffer_info()[0]
        return cls(addresses, tuple(records.values()))


class RowRange(NamedTuple):
    """Rows [start, end) of the batch are this adapter's."""

    start: int
    end: int
    records: SiteDescriptors


class AdapterGroups:
    """Struct Groups of groups.h, at `address` as long as this object lives. Rows in order, shared by no two."""

    def __init__(self, groups: Sequence[RowRange]) -> None:
        self._groups = groups
        words = [len(groups)]
        for start, end, records in groups:
            words += (start, end, records.addresses.buffer_info()[0])
        self._words = array("q", words)

    @property
    def address(self) -> int:
        """Where the kernels find it."""
        return self._words.buffer_info()[0]
