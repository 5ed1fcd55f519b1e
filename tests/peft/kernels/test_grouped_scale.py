"""Grouped scales against one row at a time."""

import pytest
import torch

from quiver_peft.kernels.cpp.groups import AdapterGroups, RowRange, SiteDescriptors
from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.grouped_scale import (
    OutputScale,
    ScaleAtSite,
    ScaleSegment,
    scale_descriptor,
    scale_inputs,
    scale_inputs_of_groups,
    scale_outputs_,
    scale_outputs_of_groups_,
)


def make_segments() -> list[ScaleSegment]:
    torch.manual_seed(0)
    both = ScaleAtSite(torch.randn(6), (OutputScale(2, 5, torch.randn(3), torch.randn(3)),))
    twice = ScaleAtSite(
        None, (OutputScale(0, 8, torch.randn(8), torch.randn(8)), OutputScale(4, 6, torch.randn(2), None))
    )
    return [ScaleSegment(1, 3, both), ScaleSegment(4, 5, twice)]


def test_inputs_of_the_rows_that_have_a_scale() -> None:
    segments = make_segments()
    x = torch.randn(7, 6)
    kept = x.clone()
    scaled = scale_inputs(x, segments)
    assert torch.equal(x, kept), "other linears read the same input"
    for row in range(7):
        factor = segments[0].scale.in_scale if row in (1, 2) else None
        assert torch.equal(scaled[row], x[row] if factor is None else x[row] * factor)


def test_without_a_scale_on_the_input_nothing_is_copied() -> None:
    x = torch.randn(7, 6)
    assert scale_inputs(x, make_segments()[1:]) is x


def test_outputs_in_order_and_nothing_else() -> None:
    segments = make_segments()
    y = torch.randn(7, 8)
    expected = y.clone()
    for segment in segments:
        for row in range(segment.start, segment.end):
            for start, end, scale, shift in segment.scale.out:
                for column in range(start, end):
                    expected[row, column] *= scale[column - start]
                    if shift is not None:
                        expected[row, column] += shift[column - start]
    untouched = [0, 3, 5, 6]
    kept = y[untouched].clone()
    scale_outputs_(y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[untouched], kept)


@pytest.mark.parametrize("width", [6, 16, 100])
def test_the_compiled_kernels_and_the_plain_forms(width: int, cpp: Library) -> None:
    """Whole batches of one adapter's rows, rows of the base between, one adapter without a scale on its input."""
    outs = (OutputScale(0, width, torch.randn(width), torch.randn(width)), OutputScale(4, 6, torch.randn(2), None))
    both, only_outs = ScaleAtSite(torch.randn(width), outs), ScaleAtSite(None, outs[:1])
    only_ins = ScaleAtSite(torch.randn(width), ())
    segments = [ScaleSegment(1, 3, both), ScaleSegment(4, 5, only_outs), ScaleSegment(5, 70, only_ins)]
    groups: list[RowRange] = []
    for start, end, scale in segments:
        groups.append(RowRange(start, end, SiteDescriptors.of({3: scale_descriptor(scale)})))
    groups.append(RowRange(70, 71, SiteDescriptors.of({})))
    fused = torch.randn(72, 2 * width)
    x, y = fused[:, :width], fused[:, width:].clone()
    assert torch.equal(scale_inputs_of_groups(x, AdapterGroups(groups), 3), scale_inputs(x, segments))
    assert torch.equal(scale_inputs_of_groups(x, AdapterGroups(groups), 4), x), "nobody acts there"
    expected = y.clone()
    scale_outputs_(expected, segments)
    scale_outputs_of_groups_(y, AdapterGroups(groups), 3)
    torch.testing.assert_close(y, expected)  # the compiler fuses the product and the sum
    assert torch.equal(y[[0, 3, 70, 71]], expected[[0, 3, 70, 71]])
