"""The Triton scale kernels against their torch twin."""

import pytest
import torch
from support.triton_twins import FlatBuffer, assert_twins, make_tiles, random_groups

from quiver_peft.errors import AdapterError
from quiver_peft.kernels.grouped_scale import OutputScale, ScaleAtSite, ScaleSegment, scale_inputs, scale_outputs_
from quiver_peft.kernels.triton.records import SCALE_FIELDS, record_table, scale_record
from quiver_peft.kernels.triton.scale import scale_inputs_triton, scale_outputs_triton_


def make(memory: FlatBuffer, size: int) -> list[ScaleAtSite]:
    """On inputs and outputs, overlapping and not, with shifts and without."""
    part = size // 3
    return [
        ScaleAtSite(memory.take(size), (OutputScale(2, part, memory.take(part - 2), memory.take(part - 2)),)),
        ScaleAtSite(
            None,
            (
                OutputScale(0, size, memory.take(size), memory.take(size)),
                OutputScale(part, size, memory.take(size - part), None),
            ),
        ),
        ScaleAtSite(memory.take(size), ()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "size"), [(11, 40), (4, 1300)])
def test_inputs_and_outputs(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    memory = FlatBuffer(dtype, device)
    adapters = make(memory, size)
    table = record_table([[], *map(scale_record, adapters)], SCALE_FIELDS).to(device)
    groups = [(2, 0, 1), (1, 1, 2), *((r, s + 2, e + 2) for r, s, e in random_groups(num_rows - 2, 3, seed=size))]
    segments = [ScaleSegment(start, end, adapters[record - 1]) for record, start, end in groups]
    tiles = make_tiles(groups, num_rows, device)
    x = torch.randn(num_rows, 2 * size, device=device).to(dtype)[:, size:]
    kept = x.clone()
    scaled = scale_inputs_triton(x, memory.buffer, table, tiles)
    assert_twins(scaled, scale_inputs(x, segments), dtype)
    assert torch.equal(x, kept), "other linears read the same input"
    assert not torch.equal(scaled, x)
    expected, y = x.clone(), x.clone()
    scale_outputs_(expected, segments)
    scale_outputs_triton_(y, memory.buffer, table, tiles)
    assert_twins(y, expected, dtype)
    assert torch.equal(y[expected == x], x[expected == x]), "what is not theirs keeps every bit"


def test_more_scales_than_a_record_holds_are_refused(device: torch.device) -> None:
    one = torch.ones(1, device=device)
    with pytest.raises(AdapterError, match="9 scales at one site; the kernels on this device take at most 8"):
        scale_record(ScaleAtSite(None, tuple(OutputScale(0, 1, one, None) for _ in range(9))))
