"""The grouped kernel against the formula, one row at a time."""

import pytest
import torch
from support.tiny import assert_close
from torch import Tensor

from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.grouped_lora import (
    LoraAtSite,
    LoraExpand,
    LoraSegment,
    add_grouped_lora_,
    add_grouped_lora_torch_,
)

NUM_INPUTS, NUM_OUTPUTS = 24, 40


def make(ranks: list[int], rows: list[tuple[int, int]], generator: torch.Generator) -> LoraAtSite:
    """An adapter with one target for each rank, on the output rows given."""
    a = torch.randn(sum(ranks), NUM_INPUTS, generator=generator)
    expands: list[LoraExpand] = []
    first = 0
    for rank, (start, end) in zip(ranks, rows, strict=True):
        b_t = torch.randn(rank, end - start, generator=generator)
        expands.append(LoraExpand((first, first + rank), start, end, b_t))
        first += rank
    return LoraAtSite(a, tuple(expands))


def naive(y: Tensor, x: Tensor, segments: list[LoraSegment]) -> Tensor:
    """Row by row, output by output."""
    out = y.clone()
    for segment in segments:
        for row in range(segment.start, segment.end):
            for expand in segment.lora.expands:
                low = segment.lora.a[expand.ranks[0] : expand.ranks[1]] @ x[row]
                for output in range(expand.start, expand.end):
                    out[row, output] += low @ expand.b_t[:, output - expand.start]
    return out


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_adapters_of_different_ranks_and_targets(generator: torch.Generator) -> None:
    one_part = make([3], [(8, 20)], generator)
    all_parts = make([1, 5, 2], [(0, 8), (8, 30), (30, 40)], generator)
    fused = make([16], [(0, NUM_OUTPUTS)], generator)
    x, y = torch.randn(11, NUM_INPUTS, generator=generator), torch.randn(11, NUM_OUTPUTS, generator=generator)
    segments = [LoraSegment(0, 1, fused), LoraSegment(2, 6, one_part), LoraSegment(6, 10, all_parts)]
    expected = naive(y, x, segments)
    untouched = y.clone()
    address = y.data_ptr()
    add_grouped_lora_(y, x, segments)
    assert y.data_ptr() == address
    assert_close(y, expected, tolerance=5e-5)
    assert torch.equal(y[[1, 10]], untouched[[1, 10]]), "rows without an adapter are not touched"
    assert torch.equal(y[2:6, :8], untouched[2:6, :8]), "outputs that are no target are not touched"
    assert torch.equal(y[2:6, 20:], untouched[2:6, 20:])


def test_one_adapter_may_have_several_segments(generator: torch.Generator) -> None:
    lora = make([4], [(0, NUM_OUTPUTS)], generator)
    x, y = torch.randn(6, NUM_INPUTS, generator=generator), torch.randn(6, NUM_OUTPUTS, generator=generator)
    segments = [LoraSegment(0, 2, lora), LoraSegment(4, 6, lora)]
    expected = naive(y, x, segments)
    add_grouped_lora_(y, x, segments)
    assert_close(y, expected, tolerance=5e-5)


def test_the_same_rows_twice_add_up(generator: torch.Generator) -> None:
    first, second = make([2], [(0, 8)], generator), make([3], [(4, 12)], generator)
    x, y = torch.randn(3, NUM_INPUTS, generator=generator), torch.zeros(3, NUM_OUTPUTS)
    segments = [LoraSegment(0, 3, first), LoraSegment(0, 3, second)]
    expected = naive(y, x, segments)
    add_grouped_lora_(y, x, segments)
    assert_close(y, expected, tolerance=2e-5)


def test_no_segments_and_empty_segments_change_nothing(generator: torch.Generator) -> None:
    x, y = torch.randn(3, NUM_INPUTS, generator=generator), torch.randn(3, NUM_OUTPUTS, generator=generator)
    before = y.clone()
    add_grouped_lora_(y, x, [])
    add_grouped_lora_(y, x, [LoraSegment(1, 1, make([2], [(0, 8)], generator))])
    assert torch.equal(y, before)


def test_half_precision(generator: torch.Generator) -> None:
    lora = make([4], [(0, NUM_OUTPUTS)], generator)
    half = LoraAtSite(lora.a.bfloat16(), tuple(e._replace(b_t=e.b_t.bfloat16()) for e in lora.expands))
    x, y = torch.randn(4, NUM_INPUTS, generator=generator), torch.randn(4, NUM_OUTPUTS, generator=generator)
    expected = naive(y, x, [LoraSegment(0, 4, lora)])
    result = y.bfloat16()
    add_grouped_lora_(result, x.bfloat16(), [LoraSegment(0, 4, half)])
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("num_inputs", [1, 24, 33, 640])
def test_the_compiled_kernel_and_the_plain_form(num_inputs: int, generator: torch.Generator, cpp: Library) -> None:
    """Many segments, of no row to a hundred; ranks and widths that fill no register; columns left out."""

    def adapter(*targets: tuple[int, int, int]) -> LoraAtSite:
        a = torch.randn(sum(rank for rank, _, _ in targets), num_inputs, generator=generator)
        expands: list[LoraExpand] = []
        first = 0
        for rank, start, end in targets:
            b_t = torch.randn(rank, end - start, generator=generator)
            expands.append(LoraExpand((first, first + rank), start, end, b_t))
            first += rank
        return LoraAtSite(a, tuple(expands))

    one, two, three = adapter((16, 0, 100)), adapter((1, 3, 20), (5, 20, 21)), adapter((9, 0, 33), (64, 40, 97))
    for lengths in ([1], [1, 1], [3], [40], [1, 100, 2, 0, 33], [2] * 20):
        segments: list[LoraSegment] = []
        row = 1  # the first row is the base's, and one between any two
        for i, length in enumerate(lengths):
            segments.append(LoraSegment(row, row + length, (one, two, three)[i % 3]))
            row += length + 1
        x, y = torch.randn(row, num_inputs, generator=generator), torch.randn(row, 100, generator=generator)
        expected, found = y.clone(), y.clone()
        add_grouped_lora_torch_(expected, x, segments)
        add_grouped_lora_(found, x, segments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * num_inputs**0.5)
        assert torch.equal(found[0], y[0])
        for segment in segments:  # the same bits alone
            alone = y.clone()
            add_grouped_lora_(alone, x, [segment])
            rows = slice(segment.start, segment.end)
            assert torch.equal(alone[rows], found[rows])
            if segment.end > segment.start:
                last = y.clone()
                add_grouped_lora_(last, x, [segment._replace(start=segment.end - 1)])
                assert torch.equal(last[segment.end - 1], found[segment.end - 1])


def test_weights_with_gaps_are_left_to_torch(generator: torch.Generator, cpp: Library) -> None:
    lora = make([4], [(0, NUM_OUTPUTS)], generator)
    wide = torch.randn(4, 2 * NUM_INPUTS, generator=generator)
    wide[:, ::2] = lora.a
    gaps = LoraAtSite(wide[:, ::2], lora.expands)
    x = torch.randn(4, NUM_INPUTS, generator=generator)
    expected, found = torch.zeros(4, NUM_OUTPUTS), torch.zeros(4, NUM_OUTPUTS)
    add_grouped_lora_(expected, x, [LoraSegment(0, 4, lora)])
    add_grouped_lora_(found, x, [LoraSegment(0, 4, gaps)])
    assert not gaps.is_contiguous
    assert_close(found, expected, tolerance=5e-5)
