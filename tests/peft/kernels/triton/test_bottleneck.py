"""The Triton bottleneck kernels against their torch twin."""

import itertools
from typing import Any

import pytest
import torch
from support.triton_twins import FlatBuffer, assert_twins, make_tiles, random_groups

from quiver_peft.kernels.grouped_bottleneck import BottleneckAtSite, BottleneckSegment, add_grouped_bottleneck_
from quiver_peft.kernels.triton.bottleneck import add_grouped_bottleneck_triton_
from quiver_peft.kernels.triton.records import (
    ACTIVATIONS,
    BOTTLENECK_FIELDS,
    NORMS,
    SOURCES,
    bottleneck_record,
    record_table,
)

RANKS = (3, 8, 17, 24)


def make(
    memory: FlatBuffer, size: int, rank: int, *, bias: bool, norm: Any, activation: Any, source: Any
) -> BottleneckAtSite:
    return BottleneckAtSite(
        memory.take(rank, size),
        memory.take(size, rank),
        memory.take(rank) if bias else None,
        memory.take(size) if bias else None,
        memory.take(size) if norm else None,
        memory.take(size) if norm else None,
        norm,
        activation,
        0.5 + rank / 10,
        source,
        memory.take(size) if source == "output_before_bias" else None,
    )


def every_choice(memory: FlatBuffer, size: int) -> list[BottleneckAtSite]:
    """Each norm with each source; the activations and ranks in turn."""
    activations, ranks = itertools.cycle(ACTIVATIONS), itertools.cycle(RANKS)
    return [
        make(memory, size, next(ranks), bias=i % 2 == 0, norm=norm, activation=next(activations), source=source)
        for i, (norm, source) in enumerate(itertools.product(NORMS, SOURCES))
    ]


def run_both(
    adapters: list[BottleneckAtSite],
    memory: FlatBuffer,
    groups: list[tuple[int, int, int]],
    out: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel made of `out` and what the twin did."""
    table = record_table([[], *map(bottleneck_record, adapters)], BOTTLENECK_FIELDS).to(out.device)
    found, expected = out.clone(), out.clone()
    segments = [BottleneckSegment(start, end, adapters[record - 1]) for record, start, end in groups]
    add_grouped_bottleneck_(expected, residual, segments)
    tiles = make_tiles(groups, len(out), out.device)
    add_grouped_bottleneck_triton_(found, residual, memory.buffer, table, tiles, max(RANKS), has_post_norm=True)
    return found, expected


@pytest.mark.parametrize("is_many", [False, True])
def test_every_norm_source_and_activation(is_many: bool, device: torch.device) -> None:
    memory = FlatBuffer(torch.float32, device)
    adapters = every_choice(memory, 40)
    size = 9 if is_many else 1
    groups = [(i + 1, size * i, size * (i + 1)) for i in range(len(adapters))]
    num_rows = size * len(adapters) + 1
    out, residual = torch.randn(num_rows, 40, device=device), 3 * torch.randn(num_rows, 40, device=device)
    found, expected = run_both(adapters, memory, groups, out, residual)
    assert_twins(found, expected, torch.float32)
    assert torch.equal(found[-1], out[-1]), "a row without an adapter keeps every bit"
    assert (found[:-1] != out[:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_sizes_of_several_planes(dtype: torch.dtype, device: torch.device) -> None:
    memory = FlatBuffer(dtype, device, 500_000)
    adapters = every_choice(memory, 1100)
    out, residual = (torch.randn(14, 1100, device=device).to(dtype) for _ in range(2))
    groups = random_groups(14, len(adapters), seed=3)
    assert_twins(*run_both(adapters, memory, groups, out, residual), dtype)
