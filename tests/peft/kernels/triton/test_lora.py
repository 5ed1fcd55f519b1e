"""The Triton LoRA kernels against their torch twin."""

import pytest
import torch
from support.triton_twins import FlatBuffer, assert_twins, make_tiles, random_groups

from quiver_peft.errors import AdapterError
from quiver_peft.kernels.grouped_lora import LoraAtSite, LoraExpand, LoraSegment, add_grouped_lora_
from quiver_peft.kernels.triton.lora import add_grouped_lora_triton_
from quiver_peft.kernels.triton.records import LORA_FIELDS, lora_record, record_table

Target = tuple[int, int, int]


def make(memory: FlatBuffer, num_inputs: int, targets: list[Target]) -> LoraAtSite:
    """targets: (rank, first output, last output)."""
    a = memory.take(sum(rank for rank, _, _ in targets), num_inputs)
    expands: list[LoraExpand] = []
    first = 0
    for rank, start, end in targets:
        expands.append(LoraExpand((first, first + rank), start, end, memory.take(rank, end - start)))
        first += rank
    return LoraAtSite(a, tuple(expands))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(30, 24, 40), (9, 1100, 200), (1, 130, 129)])
def test_mixed_ranks_and_targets(
    num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    memory = FlatBuffer(dtype, device)
    part, rest = num_outputs // 3, num_outputs // 2
    adapters = [
        make(memory, num_inputs, [(3, part, rest)]),
        make(memory, num_inputs, [(1, 0, part), (5, part, rest), (2, rest, num_outputs)]),
        make(memory, num_inputs, [(33, 0, num_outputs)]),
        make(memory, num_inputs, [(16, 0, part), (8, part, num_outputs)]),
    ]
    table = record_table([[], *map(lora_record, adapters)], LORA_FIELDS).to(device)
    groups = random_groups(num_rows, len(adapters), seed=num_rows)
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    y = torch.randn(num_rows, num_outputs, device=device).to(dtype)
    expected, before = y.clone(), y.clone()
    add_grouped_lora_(expected, x, [LoraSegment(start, end, adapters[record - 1]) for record, start, end in groups])
    add_grouped_lora_triton_(y, x, memory.buffer, table, make_tiles(groups, num_rows, device), max_rank=33)
    assert_twins(y, expected, dtype)
    theirs = torch.zeros_like(y, dtype=torch.bool)
    for record, start, end in groups:
        for expand in adapters[record - 1].expands:
            theirs[start:end, expand.start : expand.end] = True
    assert torch.equal(y[~theirs], before[~theirs]), "what is not theirs keeps every bit"
    assert not torch.equal(y, before)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """To the last bit, in either regime: its sums are cut by the linear's size alone."""
    memory = FlatBuffer(torch.float32, device)
    lora = make(memory, 700, [(4, 0, 20), (6, 20, 50)])
    table = record_table([[], lora_record(lora)], LORA_FIELDS).to(device)
    x, y = torch.randn(24, 700, device=device), torch.randn(24, 50, device=device)

    def run(first: int, last: int, groups: list[tuple[int, int, int]]) -> torch.Tensor:
        result = y[first:last].clone()
        tiles = make_tiles(groups, last - first, device)
        add_grouped_lora_triton_(result, x[first:last], memory.buffer, table, tiles, max_rank=10)
        return result

    assert torch.equal(run(2, 3, [(1, 0, 1)])[0], run(0, 8, [(1, 1, 5)])[2])
    assert torch.equal(run(0, 24, [(1, 0, 24)])[5], run(3, 20, [(1, 1, 12)])[2])


def test_strided_inputs(device: torch.device) -> None:
    """Rows may be a part of wider ones, as fused projections make them."""
    memory = FlatBuffer(torch.float32, device)
    lora = make(memory, 20, [(4, 0, 20)])
    table = record_table([[], lora_record(lora)], LORA_FIELDS).to(device)
    x, y = torch.randn(3, 50, device=device)[:, 10:30], torch.randn(3, 45, device=device)[:, 5:25]
    expected = y.clone()
    add_grouped_lora_(expected, x, [LoraSegment(0, 3, lora)])
    add_grouped_lora_triton_(y, x, memory.buffer, table, make_tiles([(1, 0, 3)], 3, device), max_rank=4)
    assert_twins(y, expected, torch.float32)


def test_more_targets_than_a_record_holds_are_refused(device: torch.device) -> None:
    lora = make(FlatBuffer(torch.float32, device), 4, [(1, i, i + 1) for i in range(5)])
    with pytest.raises(AdapterError, match="5 LoRA targets at one site; the kernels on this device take at most 4"):
        lora_record(lora)
