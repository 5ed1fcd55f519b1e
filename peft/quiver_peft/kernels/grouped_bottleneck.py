"""Grouped bottlenecks: many adapters on one packed batch, rows grouped by adapter, weights read in place."""

import struct
from array import array
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.cpp.groups import AdapterGroups
from quiver_peft.kernels.cpp.library import library_for

NORM_EPS = 1e-5

NormPosition = Literal["pre", "post"]
Activation = Literal["swish", "relu", "gelu", "gelu_tanh"]
Source = Literal["output", "output_before_bias", "sum", "residual"]


class BottleneckAtSite(NamedTuple):
    """One adapter's bottleneck after one sub-layer: out + scale · up(act(down(u))), a LayerNorm on u or on the result.

    down: [R, D], up: [D, R], their biases [R] and [D] or None, norm weight and bias: [D] or None.
    source: what u is: the sub-layer's output, that less `out_bias` ([D]; None: nothing), its sum with the residual, or
        the residual alone.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_position: NormPosition | None
    activation: Activation
    scale: float
    source: Source
    out_bias: Tensor | None = None


# Enumerations of bottleneck.cpp; activations as quiver_activate numbers them.
_CPP_NORMS: dict[NormPosition | None, int] = {None: 0, "pre": 1, "post": 2}
_CPP_ACTIVATIONS: dict[Activation, int] = {"swish": 0, "relu": 1, "gelu_tanh": 3, "gelu": 4}
_CPP_SOURCES: dict[Source, int] = {"output": 0, "output_before_bias": 1, "sum": 2, "residual": 3}


def bottleneck_descriptor(bottleneck: BottleneckAtSite) -> "array[int]":
    """Struct Bottleneck of bottleneck.cpp, for the compiled kernel. All tensors must be contiguous."""
    tensors = (
        bottleneck.down,
        bottleneck.up,
        bottleneck.down_bias,
        bottleneck.up_bias,
        bottleneck.norm_weight,
        bottleneck.norm_bias,
        bottleneck.out_bias,
    )
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    numbers = (
        _CPP_NORMS[bottleneck.norm_position],
        _CPP_ACTIVATIONS[bottleneck.activation],
        _CPP_SOURCES[bottleneck.source],
    )
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    (floats,) = struct.unpack("q", struct.pack("ff", bottleneck.scale, NORM_EPS))
    return array("q", (len(bottleneck.down), *addresses, *numbers, floats))


class BottleneckSegment(NamedTuple):
    """Rows [start, end) of the batch use `bottleneck`."""

    start: int
    end: int
    bottleneck: BottleneckAtSite


def bottleneck_delta(bottleneck: BottleneckAtSite, out: Tensor, residual: Tensor) -> Tensor:
    """What the bottleneck adds to the sub-layer's output. out, residual: [*, D] -> [*, D], in the weights' type."""
    source = bottleneck.source
    u = residual if source == "residual" else out + residual if source == "sum" else out
    u = u.to(bottleneck.down.dtype)
    if bottleneck.out_bias is not None:
        u = u - bottleneck.out_bias
    if bottleneck.norm_position == "pre":
        u = F.layer_norm(u, u.shape[-1:], bottleneck.norm_weight, bottleneck.norm_bias, NORM_EPS)
    inner = _activate(bottleneck.activation, F.linear(u, bottleneck.down, bottleneck.down_bias))
    delta = F.linear(inner, bottleneck.up, bottleneck.up_bias)
    if bottleneck.norm_position == "post":
        delta = F.layer_norm(delta, delta.shape[-1:], bottleneck.norm_weight, bottleneck.norm_bias, NORM_EPS)
    return delta * bottleneck.scale


def add_grouped_bottleneck_(out: Tensor, residual: Tensor, segments: Sequence[BottleneckSegment]) -> None:
    """out[rows] += its bottleneck for each segment, in place. out, residual: [T, D]."""
    for segment in segments:
        rows = slice(segment.start, segment.end)
        out[rows] += bottleneck_delta(segment.bottleneck, out[rows], residual[rows])


def add_bottleneck_of_groups_(out: Tensor, residual: Tensor, groups: AdapterGroups, site: int) -> None:
    """`add_grouped_bottleneck_` by the compiled kernel. site: the site's number in the groups' descriptors."""
    cpp = library_for(out, residual)
    assert cpp is not None and out.is_contiguous() and residual.is_contiguous()
    cpp.add_bottleneck(out.data_ptr(), residual.data_ptr(), out.shape[1], groups.address, site)


def _activate(kind: Activation, x: Tensor) -> Tensor:
    if kind == "swish":
        return F.silu(x)
    if kind == "relu":
        return torch.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
