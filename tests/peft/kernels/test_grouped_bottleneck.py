"""Grouped bottlenecks against the formula, written out row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quiver_peft.kernels.cpp.groups import AdapterGroups, RowRange, SiteDescriptors
from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.grouped_bottleneck import (
    BottleneckAtSite,
    BottleneckSegment,
    add_bottleneck_of_groups_,
    add_grouped_bottleneck_,
    bottleneck_delta,
    bottleneck_descriptor,
)

HIDDEN = 8


def make(width: int, *, bias: bool = False, **choices: Any) -> BottleneckAtSite:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape)

    normed = choices.get("norm_position") is not None
    settings: Any = {"norm_position": None, "activation": "relu", "scale": 1.0, "source": "output", **choices}
    return BottleneckAtSite(
        draw(width, HIDDEN),
        draw(HIDDEN, width),
        draw(width) if bias else None,
        draw(HIDDEN) if bias else None,
        draw(HIDDEN) if normed else None,
        draw(HIDDEN) if normed else None,
        **settings,
    )


def norm(x: Tensor, bottleneck: BottleneckAtSite) -> Tensor:
    centred = x - x.mean()
    assert bottleneck.norm_weight is not None and bottleneck.norm_bias is not None
    return centred / (centred.square().mean() + 1e-5).sqrt() * bottleneck.norm_weight + bottleneck.norm_bias


def activated(kind: str, x: Tensor) -> Tensor:
    if kind == "relu":
        return x.clamp(min=0)
    if kind == "swish":
        return x / (1 + (-x).exp())
    if kind == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def by_hand(bottleneck: BottleneckAtSite, out: Tensor, residual: Tensor) -> Tensor:
    """One row."""
    u = {"residual": residual, "sum": out + residual}.get(bottleneck.source, out)
    if bottleneck.source == "output_before_bias":
        assert bottleneck.out_bias is not None
        u = u - bottleneck.out_bias
    if bottleneck.norm_position == "pre":
        u = norm(u, bottleneck)
    inner = bottleneck.down @ u
    if bottleneck.down_bias is not None:
        inner = inner + bottleneck.down_bias
    inner = activated(bottleneck.activation, inner)
    z = bottleneck.up @ inner
    if bottleneck.up_bias is not None:
        z = z + bottleneck.up_bias
    if bottleneck.norm_position == "post":
        z = norm(z, bottleneck)
    return bottleneck.scale * z


CHOICES: list[dict[str, Any]] = [
    {},
    {"bias": True, "activation": "swish"},
    {"norm_position": "pre", "activation": "gelu"},
    {"norm_position": "post", "activation": "gelu_tanh", "scale": 0.5},
    {"source": "sum", "bias": True},
    {"source": "residual", "scale": 4.0},
    {"source": "output_before_bias", "out_bias": torch.linspace(-3, 3, HIDDEN), "norm_position": "pre"},
]


@pytest.mark.parametrize("choices", CHOICES)
def test_the_formula(choices: dict[str, Any]) -> None:
    torch.manual_seed(1)
    bottleneck = make(3, **choices)
    out, residual = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    delta = bottleneck_delta(bottleneck, out, residual)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(delta[i, j], by_hand(bottleneck, out[i, j], residual[i, j]))


def test_each_row_meets_its_own() -> None:
    torch.manual_seed(2)
    segments = [BottleneckSegment(1, 3, make(3)), BottleneckSegment(3, 4, make(7, norm_position="pre"))]
    out, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    before = out.clone()
    add_grouped_bottleneck_(out, residual, segments)
    for row in range(6):
        owner = next((s.bottleneck for s in segments if s.start <= row < s.end), None)
        if owner is None:
            assert torch.equal(out[row], before[row])
        else:
            torch.testing.assert_close(out[row], before[row] + by_hand(owner, before[row], residual[row]))


@pytest.mark.parametrize("norm_position", [None, "pre", "post"])
@pytest.mark.parametrize("source", ["output", "output_before_bias", "sum", "residual"])
@pytest.mark.parametrize("activation", ["swish", "relu", "gelu_tanh", "gelu"])
def test_the_compiled_kernel_and_the_plain_form(
    norm_position: str | None, source: str, activation: str, cpp: Library
) -> None:
    """Widths that fill no register, with biases and without; more rows than one task takes; the same bits alone."""
    choices: dict[str, Any] = {"norm_position": norm_position, "source": source, "activation": activation, "scale": 0.7}
    if source == "output_before_bias":
        choices["out_bias"] = torch.randn(HIDDEN)
    pair = make(5, bias=True, **choices), make(33, **choices)
    records = [bottleneck_descriptor(item) for item in pair]
    rows = [(1, 2, 0), (3, 40, 1), (40, 44, 0)]
    groups = [RowRange(start, end, SiteDescriptors.of({1: records[i]})) for start, end, i in rows]
    out, residual = torch.randn(45, HIDDEN), torch.randn(45, HIDDEN)
    expected, found = out.clone(), out.clone()
    add_grouped_bottleneck_(expected, residual, [BottleneckSegment(start, end, pair[i]) for start, end, i in rows])
    add_bottleneck_of_groups_(found, residual, AdapterGroups(groups), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[[0, 2, 44]], out[[0, 2, 44]]), "the base's rows"
    alone = out.clone()
    add_bottleneck_of_groups_(alone, residual, AdapterGroups([groups[1]._replace(start=39)]), 1)
    assert torch.equal(alone[39], found[39])
