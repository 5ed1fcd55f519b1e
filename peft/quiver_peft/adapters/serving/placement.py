"""Where one adapter's weights lie in the adapter memory: copied once at load, read in place by every step."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from quiver_peft.adapters.methods.bottleneck import BottleneckWeights
from quiver_peft.adapters.methods.lora import LoraWeights
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.kernels.grouped_bottleneck import BottleneckAtSite
from quiver_peft.kernels.grouped_lora import LoraAtSite, LoraExpand
from quiver_peft.kernels.grouped_scale import OutputScale, ScaleAtSite


class ResidentWeights(NamedTuple):
    """One adapter in the adapter memory, by site.

    prompt: [n, D] or None. prefix: keys and values, each [L, n, G, E], or None; its rows come before the prompt's.
    """

    lora: dict[str, LoraAtSite]
    scales: dict[str, ScaleAtSite]
    bottlenecks: dict[str, BottleneckAtSite]
    prompt: Tensor | None
    prefix: tuple[Tensor, Tensor] | None


class _FlatWriter:
    """Hands out a flat piece of memory from its start to its end."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._offset = 0

    def take(self, *shape: int) -> Tensor:
        """A contiguous view of the next elements."""
        size = 1
        for length in shape:
            size *= length
        view = self._memory[self._offset : self._offset + size].view(shape)
        self._offset += size
        return view

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the next elements."""
        view = self.take(*tensor.shape)
        view.copy_(tensor)
        return view

    def put_optional(self, tensor: Tensor | None) -> Tensor | None:
        """The same, where there may be none."""
        return None if tensor is None else self.put(tensor)


def num_elements(weights: AdapterWeights) -> int:
    """How many elements of adapter memory these weights take."""
    total = sum(item.a.numel() + item.b.numel() for item in weights.lora)
    for scale in weights.scales.values():
        total += _size(scale.in_scale) + sum(_size(out.scale) + _size(out.shift) for out in scale.out)
    for item in weights.bottlenecks:
        total += sum(_size(tensor) for tensor in item.tensors().values()) + _size(item.at_site.out_bias)
    if weights.prompt is not None:
        total += weights.prompt.table.numel()
    if weights.prefix is not None:
        total += weights.prefix.keys.numel() + weights.prefix.values.numel()
    return total


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def copy_weights(weights: AdapterWeights, memory: Tensor) -> ResidentWeights:
    """Copy an adapter into `memory` [at least num_elements(weights)]."""
    cursor = _FlatWriter(memory)
    prefix = weights.prefix

    def layers(pairs: Tensor) -> Tensor:
        """By layer, which is how they are read."""
        assert prefix is not None
        return cursor.put(pairs[list(prefix.pairs)])

    return ResidentWeights(
        _copy_lora(weights.lora, cursor),
        {site: _copy_scale(scale, cursor) for site, scale in weights.scales.items()},
        {item.site: _copy_bottleneck(item, cursor) for item in weights.bottlenecks},
        None if weights.prompt is None else cursor.put(weights.prompt.table),
        None if prefix is None else (layers(prefix.keys), layers(prefix.values)),
    )


def _copy_lora(weights: Sequence[LoraWeights], cursor: _FlatWriter) -> dict[str, LoraAtSite]:
    """Site by site: every A of a site as one matrix, then every scaled Bᵀ."""
    by_site: dict[str, list[LoraWeights]] = {}
    for item in weights:
        by_site.setdefault(item.target.site, []).append(item)
    placed: dict[str, LoraAtSite] = {}
    for site, items in by_site.items():
        a = cursor.take(sum(item.a.shape[0] for item in items), items[0].a.shape[1])
        expands: list[LoraExpand] = []
        first = 0
        for item in items:
            rank = item.a.shape[0]
            a[first : first + rank].copy_(item.a)
            b_t = cursor.put(item.b.T * item.scale)
            expands.append(LoraExpand((first, first + rank), *item.target.rows, b_t))
            first += rank
        placed[site] = LoraAtSite(a, tuple(expands))
    return placed


def _copy_scale(scale: ScaleAtSite, cursor: _FlatWriter) -> ScaleAtSite:
    in_scale = cursor.put_optional(scale.in_scale)
    out = [OutputScale(o.start, o.end, cursor.put(o.scale), cursor.put_optional(o.shift)) for o in scale.out]
    return ScaleAtSite(in_scale, tuple(out))


def _copy_bottleneck(item: BottleneckWeights, cursor: _FlatWriter) -> BottleneckAtSite:
    weights = item.at_site
    return weights._replace(
        down=cursor.put(weights.down),
        up=cursor.put(weights.up),
        down_bias=cursor.put_optional(weights.down_bias),
        up_bias=cursor.put_optional(weights.up_bias),
        norm_weight=cursor.put_optional(weights.norm_weight),
        norm_bias=cursor.put_optional(weights.norm_bias),
        out_bias=cursor.put_optional(weights.out_bias),
    )
