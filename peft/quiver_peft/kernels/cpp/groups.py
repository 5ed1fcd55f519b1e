"""The adapters of a step as the C++ kernels read them (groups.h): row ranges, and descriptors by site."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple


class SiteDescriptors(NamedTuple):
    """One adapter's descriptors.

    addresses: the number of sites, then for each site the address of its descriptor, or 0. kept: the descriptors, which
        must outlive the addresses.
    """

    addresses: "array[int]"
    kept: "Sequence[array[int]]"

    @classmethod
    def of(cls, records: "dict[int, array[int]]") -> "SiteDescriptors":
        """records: descriptors by site number."""
        size = 1 + max(records, default=-1)
        addresses = array("q", [size] + [0] * size)
        for site, record in records.items():
            addresses[1 + site] = record.buffer_info()[0]
        return cls(addresses, tuple(records.values()))


class RowRange(NamedTuple):
    """Rows [start, end) of the batch use one adapter."""

    start: int
    end: int
    records: SiteDescriptors


class AdapterGroups:
    """Struct Groups of groups.h. The ranges must be in order and must not overlap."""

    def __init__(self, groups: Sequence[RowRange]) -> None:
        self._groups = groups
        words = [len(groups)]
        for start, end, records in groups:
            words += (start, end, records.addresses.buffer_info()[0])
        self._words = array("q", words)

    @property
    def address(self) -> int:
        """Address of the struct, valid as long as this object lives."""
        return self._words.buffer_info()[0]
