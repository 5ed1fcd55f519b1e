"""Grouped scales: IA3's vectors and DoRA's magnitudes of many adapters on one packed batch, grouped by adapter."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from quiver_peft.kernels.cpp.groups import AdapterGroups
from quiver_peft.kernels.cpp.library import library_for


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


def scale_descriptor(scale: ScaleAtSite) -> "array[int]":
    """Struct Scale of scale.cpp, for the compiled kernel. All vectors must be contiguous."""
    vectors = [scale.in_scale, *(vector for out in scale.out for vector in (out.scale, out.shift))]
    assert all(vector is None or vector.is_contiguous() for vector in vectors)
    words = [_address(scale.in_scale), len(scale.out)]
    for out in scale.out:
        words += [out.start, out.end, _address(out.scale), _address(out.shift)]
    return array("q", words)


def _address(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.data_ptr()


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


def scale_inputs_of_groups(x: Tensor, groups: AdapterGroups, site: int) -> Tensor:
    """`scale_inputs` by the compiled kernel. site: the site's number in the groups' descriptors."""
    cpp = library_for(x)
    assert cpp is not None and x.stride(1) == 1
    out = cpp.empty(x.shape)
    cpp.scale_inputs(x.data_ptr(), x.stride(0), out.data_ptr(), len(x), x.shape[1], groups.address, site)
    return out


def scale_outputs_of_groups_(y: Tensor, groups: AdapterGroups, site: int) -> None:
    """`scale_outputs_` by the compiled kernel. site: the site's number in the groups' descriptors."""
    cpp = library_for(y)
    assert cpp is not None and y.stride(1) == 1
    cpp.scale_outputs(y.data_ptr(), y.stride(0), groups.address, site)
