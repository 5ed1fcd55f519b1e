"""The seam of one mixed batch for the compiled kernels: a call or two at a site, however many adapters act there."""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from quiver_peft.adapters.bank_seam import BankSeam
from quiver_peft.adapters.placing import Placed
from quiver_peft.base.sites import NO_ADAPTERS, Linear, Site
from quiver_peft.kernels.grouped_lora import add_lora_of_groups_
from quiver_peft.kernels.native.groups import Groups, RowsOf, SiteRecords


class NativeRecord(NamedTuple):
    """What the kernels are told of one adapter, and at which sites it acts: bit i of a number is site i."""

    sites: SiteRecords
    lora: int


class Acts(NamedTuple):
    """At which sites any adapter of a batch acts, as in `NativeRecord`."""

    lora: int


def native_record(placed: Placed, numbers: dict[str, int]) -> NativeRecord | None:
    """numbers: of the sites; new ones are added. None for an adapter that the kernels cannot take."""
    if placed.scales or placed.bottlenecks:
        return None
    records: dict[int, array[int]] = {}
    lora = 0
    for site, at_site in placed.lora.items():
        number = numbers.setdefault(site, len(numbers))
        if at_site.descriptor is None:
            return None
        records[number] = at_site.descriptor
        lora |= 1 << number
    return NativeRecord(SiteRecords.of(records), lora)


class NativeSeam:
    """As `BankSeam`, of which it keeps the virtual tokens.

    address: of what changes with the batch. acts, has_virtual: all else that what it does depends on.
    """

    def __init__(
        self, used: Sequence[tuple[int, int, NativeRecord]], numbers: Mapping[str, int], virtual: BankSeam | None
    ) -> None:
        """used: rows [start, end) and whose they are. numbers: of the sites."""
        self._groups = Groups([RowsOf(start, end, record.sites) for start, end, record in used])
        self._numbers = numbers
        self._virtual = virtual
        lora = 0
        for _, _, record in used:
            lora |= record.lora
        self.acts = Acts(lora)

    @property
    def address(self) -> int:
        """Of the groups of rows, as long as this object lives."""
        return self._groups.address

    @property
    def has_virtual(self) -> bool:
        """Whether some rows are virtual tokens."""
        return self._virtual is not None

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """tokens: [T] -> [T, D], the rows of virtual tokens replaced."""
        seam = self._virtual or NO_ADAPTERS
        return seam.embed(site, tokens, embedding)

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [T, G, E], the rows of prefixes replaced."""
        seam = self._virtual or NO_ADAPTERS
        return seam.key_values(site, k, v)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        number = self._numbers.get(linear.site.name, -1)
        y = linear(x)
        if number >= 0 and self.acts.lora >> number & 1:
            add_lora_of_groups_(y, x, self._groups, number)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """out, residual: [T, D] -> [T, D]."""
        return out
