"""Learned scales of many adapters on one packed batch: IA3's vectors and DoRA's gates, rows grouped by adapter."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class OutputScale(NamedTuple):
    """Outputs [start, end) of a linear become scale · y + shift. scale: [end - start]; shift: the same, or None."""

    start: int
    end: int
    scale: Tensor
    shift: Tensor | None


class ScaleAtSite(NamedTuple):
    """One adapter's scales at one linear. in_scale: [K], on its input, or None. out: applied in order."""

    in_scale: Tensor | None
    out: tuple[OutputScale, ...]


class ScaleSegment(NamedTuple):
    """Rows [start, end) of the batch use `scale`."""

    start: int
    end: int
    scale: ScaleAtSite


def scale_inputs(x: Tensor, segments: Sequence[ScaleSegment]) -> Tensor:
    """x[rows] · in_scale for each segment that has one. x: [T, K] -> [T, K]; x itself is never changed."""
    scaled: Tensor | None = None
    for segment in segments:
        if segment.scale.in_scale is not None:
            if scaled is None:
                scaled = x.clone()
            scaled[segment.start : segment.end] *= segment.scale.in_scale
    return x if scaled is None else scaled


def scale_outputs_(y: Tensor, segments: Sequence[ScaleSegment]) -> None:
    """y[rows, outputs] = scale · y + shift for each segment, in place. y: [T, N]."""
    for segment in segments:
        rows = y[segment.start : segment.end]
        for out in segment.scale.out:
            outputs = rows[:, out.start : out.end].mul_(out.scale)
            if out.shift is not None:
                outputs += out.shift
