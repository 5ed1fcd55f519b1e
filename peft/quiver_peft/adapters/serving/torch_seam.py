"""The seam of one mixed batch: what the adapters in memory do to the rows that are theirs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from quiver_peft.adapters.serving.placement import ResidentWeights
from quiver_peft.base.sites import Linear, Site
from quiver_peft.kernels.grouped_bottleneck import BottleneckSegment, add_grouped_bottleneck_
from quiver_peft.kernels.grouped_lora import LoraSegment, add_grouped_lora_
from quiver_peft.kernels.grouped_scale import ScaleSegment, scale_inputs, scale_outputs_


class RowGroup(NamedTuple):
    """Rows [start, end) of a packed batch belong to the adapter in `slot`."""

    slot: int
    start: int
    end: int


class VirtualRows(NamedTuple):
    """Rows [start, end) of a packed batch are virtual tokens `first`, `first + 1`, ... of the adapter in `slot`.

    An adapter's prefix is numbered first, then its prompt.
    """

    slot: int
    start: int
    end: int
    first: int


class _PromptRows(NamedTuple):
    start: int
    end: int
    embeddings: Tensor | None  # [end - start, D]; None: placeholders of a prefix, whose hidden states nobody reads


class _PrefixRows(NamedTuple):
    start: int
    end: int
    keys: Tensor  # [L, end - start, G, E]
    values: Tensor


class TorchSeam:
    """For inference: works on the base's outputs in place where it can. Rows that no adapter touches cost nothing."""

    def __init__(
        self,
        used: Sequence[tuple[RowGroup, ResidentWeights]],
        virtual: Sequence[tuple[VirtualRows, ResidentWeights]],
    ) -> None:
        self._lora: dict[str, list[LoraSegment]] = {}
        self._scales: dict[str, list[ScaleSegment]] = {}
        self._bottlenecks: dict[str, list[BottleneckSegment]] = {}
        for group, placed in used:
            for site, item in placed.lora.items():
                self._lora.setdefault(site, []).append(LoraSegment(group.start, group.end, item))
            for site, scale in placed.scales.items():
                self._scales.setdefault(site, []).append(ScaleSegment(group.start, group.end, scale))
            for site, bottleneck in placed.bottlenecks.items():
                self._bottlenecks.setdefault(site, []).append(BottleneckSegment(group.start, group.end, bottleneck))
        self._prompts: list[_PromptRows] = []
        self._prefixes: list[_PrefixRows] = []
        for rows, placed in virtual:
            self._add_virtual(rows, placed)

    def _add_virtual(self, rows: VirtualRows, placed: ResidentWeights) -> None:
        """A chunk may hold any stretch of an adapter's virtual tokens, the prefix's and the prompt's."""
        num_prefix = 0 if placed.prefix is None else placed.prefix[0].shape[1]
        first, last = rows.first, rows.first + rows.end - rows.start
        split = rows.start + min(max(num_prefix - first, 0), rows.end - rows.start)
        if placed.prefix is not None and split > rows.start:
            keys, values = (part[:, first : min(last, num_prefix)] for part in placed.prefix)
            self._prefixes.append(_PrefixRows(rows.start, split, keys, values))
            self._prompts.append(_PromptRows(rows.start, split, None))
        if placed.prompt is not None and split < rows.end:
            table = placed.prompt[max(first - num_prefix, 0) : last - num_prefix]
            self._prompts.append(_PromptRows(split, rows.end, table))

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """tokens: [T] -> [T, D], the rows of virtual tokens replaced."""
        embedded = embedding(tokens)
        for rows in self._prompts:
            embedded[rows.start : rows.end] = 0 if rows.embeddings is None else rows.embeddings
        return embedded

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        site = linear.site.name
        scales = self._scales.get(site)
        if scales:
            x = scale_inputs(x, scales)
        y = linear(x)
        if lora := self._lora.get(site):
            add_grouped_lora_(y, x, lora)
        if scales:
            scale_outputs_(y, scales)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """out, residual: [T, D] -> [T, D]."""
        if bottlenecks := self._bottlenecks.get(site.name):
            add_grouped_bottleneck_(out, residual, bottlenecks)
        return out

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [T, G, E], the rows of prefixes replaced."""
        for rows in self._prefixes:
            k[rows.start : rows.end] = rows.keys[site.layer]
            v[rows.start : rows.end] = rows.values[site.layer]
        return k, v
