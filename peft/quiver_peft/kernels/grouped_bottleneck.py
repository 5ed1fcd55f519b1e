"""Bottleneck adapters of many owners on one packed batch: rows are grouped by adapter, weights read where they lie."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _activate(kind: Activation, x: Tensor) -> Tensor:
    if kind == "swish":
        return F.silu(x)
    if kind == "relu":
        return torch.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
