"""Grouped scales against one row at a time."""

import torch

from quiver_peft.kernels.grouped_scale import OutputScale, ScaleAtSite, ScaleSegment, scale_inputs, scale_outputs_


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
