"""The seam of one mixed batch for the compiled kernels: a call or two at a site, however many adapters act there."""

import operator
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from quiver_peft.adapters.serving.placement import ResidentWeights
from quiver_peft.adapters.serving.torch_seam import TorchSeam
from quiver_peft.base.sites import NO_ADAPTERS, Linear, Site
from quiver_peft.kernels.cpp.groups import AdapterGroups, RowRange, SiteDescriptors
from quiver_peft.kernels.grouped_bottleneck import add_bottleneck_of_groups_, bottleneck_descriptor
from quiver_peft.kernels.grouped_lora import add_lora_of_groups_
from quiver_peft.kernels.grouped_scale import scale_descriptor, scale_inputs_of_groups, scale_outputs_of_groups_

# Kinds of records, of which a site has one each.
_LORA, _SCALE, _BOTTLENECK, _KINDS = range(4)


class ActiveHooks(NamedTuple):
    """At which sites something is done, by method: bit i of a number is site i."""

    lora: int = 0
    in_scales: int = 0
    out_scales: int = 0
    bottlenecks: int = 0

    def union(self, other: "ActiveHooks") -> "ActiveHooks":
        """What is done by either."""
        return ActiveHooks(*map(operator.or_, self, other))


class SiteIndex:
    """The sites at which any adapter so far has acted: numbered as they come, and what was done there."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.acts = ActiveHooks()


class CppDescriptor(NamedTuple):
    """What the kernels are told of one adapter, and where it acts."""

    sites: SiteDescriptors
    acts: ActiveHooks


def cpp_descriptor(placed: ResidentWeights, sites: SiteIndex) -> CppDescriptor:
    """An adapter as the compiled kernels read it. Adds the sites where it acts to `sites`."""
    numbers = sites.numbers
    records: dict[int, array[int]] = {}

    def add(site: str, kind: int, record: "array[int]") -> None:
        records[numbers.setdefault(site, len(numbers)) * _KINDS + kind] = record

    for site, lora in placed.lora.items():
        add(site, _LORA, lora.descriptor)
    for site, scale in placed.scales.items():
        add(site, _SCALE, scale_descriptor(scale))
    for site, bottleneck in placed.bottlenecks.items():
        add(site, _BOTTLENECK, bottleneck_descriptor(bottleneck))
    acts = ActiveHooks(
        _bits(numbers[site] for site in placed.lora),
        _bits(numbers[site] for site, scale in placed.scales.items() if scale.in_scale is not None),
        _bits(numbers[site] for site, scale in placed.scales.items() if scale.out),
        _bits(numbers[site] for site in placed.bottlenecks),
    )
    sites.acts = sites.acts.union(acts)
    return CppDescriptor(SiteDescriptors.of(records), acts)


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


class CppSeam:
    """As `TorchSeam`, of which it keeps the virtual tokens.

    address: of what changes with the batch. acts, has_virtual: all else that what it does depends on.
    """

    def __init__(
        self, used: Sequence[tuple[int, int, CppDescriptor]], sites: SiteIndex, virtual: TorchSeam | None
    ) -> None:
        """used: rows [start, end) and whose they are."""
        self._groups = AdapterGroups([RowRange(start, end, record.sites) for start, end, record in used])
        self._numbers = sites.numbers
        self._virtual = virtual
        acts = ActiveHooks()
        for _, _, record in used:
            acts = acts.union(record.acts)
        # A method that is used here at all is called wherever anybody uses it, which finds nothing to do in no time:
        # so what the seam does depends on the methods in the batch, not on each adapter's own sites.
        self.acts = ActiveHooks(*(everyone if ours else 0 for ours, everyone in zip(acts, sites.acts, strict=True)))

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
        number, acts, groups = self._numbers.get(linear.site.name), self.acts, self._groups
        if number is None:
            return linear(x)
        if acts.in_scales >> number & 1:
            x = scale_inputs_of_groups(x, groups, number * _KINDS + _SCALE)
        y = linear(x)
        if acts.lora >> number & 1:
            add_lora_of_groups_(y, x, groups, number * _KINDS + _LORA)
        if acts.out_scales >> number & 1:
            scale_outputs_of_groups_(y, groups, number * _KINDS + _SCALE)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """out, residual: [T, D] -> [T, D]."""
        number = self._numbers.get(site.name)
        if number is not None and self.acts.bottlenecks >> number & 1:
            add_bottleneck_of_groups_(out, residual, self._groups, number * _KINDS + _BOTTLENECK)
        return out
