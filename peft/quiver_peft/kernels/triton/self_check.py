"""Self-check on the device: each Triton kernel against its torch reference, in the shapes to be served."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quiver_peft.kernels.grouped_bottleneck import BottleneckAtSite, BottleneckSegment, add_grouped_bottleneck_
from quiver_peft.kernels.grouped_lora import LoraAtSite, LoraExpand, LoraSegment, add_grouped_lora_
from quiver_peft.kernels.grouped_scale import OutputScale, ScaleAtSite, ScaleSegment, scale_inputs, scale_outputs_
from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.kernels.triton import records
from quiver_peft.kernels.triton.bottleneck import add_grouped_bottleneck_triton_
from quiver_peft.kernels.triton.lora import add_grouped_lora_triton_
from quiver_peft.kernels.triton.paged_attention import SPLIT_TOKENS, paged_attention_triton
from quiver_peft.kernels.triton.scale import scale_inputs_triton, scale_outputs_triton_
from quiver_peft.kernels.triton.tiles import tiles_on
from quiver_peft.rounding import ceil_div

log = logging.getLogger(__name__)

# Relative to the largest expected value. The reference rounds to the type more often than the kernel does.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
RANK = 12
# One row of an adapter, several rows, and rows of the base at the end.
GROUPS = ((1, 0, 1), (1, 1, 21))
NUM_ROWS = 23

Pair = tuple[Tensor, Tensor]


def check_adapter_kernels(
    linears: Iterable[tuple[int, int]], hidden_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether LoRA, scales and bottlenecks may be used. linears: (inputs, outputs) of the base's linears."""
    draw = torch.Generator().manual_seed(0)
    where = (dtype, device, draw)
    shapes = sorted(set(linears))
    checks: list[tuple[str, Callable[[], list[Pair]]]] = []
    checks += [("grouped LoRA", partial(_lora, *shape, *where)) for shape in shapes]
    checks += [("grouped scales", partial(_scales, size, *where)) for size in sorted({n for _, n in shapes})]
    checks += [("grouped bottlenecks", partial(_bottleneck, hidden_size, norm, *where)) for norm in ("pre", "post")]
    return _all_within_tolerance(checks)


def check_attention_kernels(
    twin: Callable[..., Tensor], group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the paged attention may be used, with `group` query heads for each of keys and values."""
    draw = torch.Generator().manual_seed(0)
    lengths = [(1, 2 * SPLIT_TOKENS + 9), (1, 5), (40, 70), (3, 3)]
    bias = torch.randn(2 * group, 33, generator=draw).to(device)
    choices: list[tuple[bool, int | None, Tensor | None]] = [(True, None, None), (True, 30, None), (False, None, None)]
    choices += [(True, None, bias), (False, None, bias)]
    run = partial(_attention, twin, lengths, group, head_dim, dtype, device, draw)
    return _all_within_tolerance([("paged attention", partial(run, *choice)) for choice in choices])


def _all_within_tolerance(checks: Sequence[tuple[str, Callable[[], list[Pair]]]]) -> bool:
    """Runs every check, so that the log names each kernel that fails."""
    found = [_within_tolerance(name, run) for name, run in checks]
    return all(found)


def _within_tolerance(name: str, run: Callable[[], list[Pair]]) -> bool:
    try:
        for found, expected in run():
            error = (found.float() - expected.float()).abs().max().item()
            allowed = TOLERANCES[expected.dtype] * max(1.0, expected.float().abs().max().item())
            if not error <= allowed:  # a NaN is not
                log.error("Triton kernel %s disabled: error %g exceeds tolerance %g", name, error, allowed)
                return False
    except Exception:
        log.exception("Triton kernel %s disabled: it cannot run", name)
        return False
    return True


class _FlatBuffer:
    """A flat buffer of random numbers on the device; `take` hands out consecutive views."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> None:
        self.buffer = torch.randn(size, generator=draw).to(device, dtype)
        self._taken = 0

    def take(self, *shape: int) -> Tensor:
        view = self.buffer[self._taken :][: torch.Size(shape).numel()].view(shape)
        self._taken += view.numel()
        return view


def _rows(size: int, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> Tensor:
    """Random rows [NUM_ROWS, size], scaled so that sums over a row are of order one."""
    return (torch.randn(NUM_ROWS, size, generator=draw) * size**-0.5).to(device, dtype)


def _table(record: list[int], num_fields: int, device: torch.device) -> Tensor:
    return records.record_table([[], record], num_fields).to(device)


def _lora(num_inputs: int, num_outputs: int, *where: Any) -> list[Pair]:
    dtype, device, draw = where
    memory = _FlatBuffer(RANK * (num_inputs + num_outputs), dtype, device, draw)
    half, a = num_outputs // 2, memory.take(RANK, num_inputs)
    first = LoraExpand((0, 4), 0, half, memory.take(4, half))
    second = LoraExpand((4, RANK), half, num_outputs, memory.take(RANK - 4, num_outputs - half))
    lora = LoraAtSite(a, (first, second))
    x, y = _rows(num_inputs, dtype, device, draw), _rows(num_outputs, dtype, device, draw)
    expected, table = y.clone(), _table(records.lora_record(lora), records.LORA_FIELDS, device)
    add_grouped_lora_(expected, x, [LoraSegment(start, end, lora) for _, start, end in GROUPS])
    add_grouped_lora_triton_(y, x, memory.buffer, table, tiles_on(device, GROUPS, NUM_ROWS), RANK)
    return [(y, expected)]


def _scales(size: int, *where: Any) -> list[Pair]:
    dtype, device, draw = where
    memory = _FlatBuffer(3 * size, dtype, device, draw)
    scale = ScaleAtSite(memory.take(size), (OutputScale(0, size, memory.take(size), memory.take(size)),))
    segments = [ScaleSegment(start, end, scale) for _, start, end in GROUPS]
    table = _table(records.scale_record(scale), records.SCALE_FIELDS, device)
    x, tiles = _rows(size, dtype, device, draw), tiles_on(device, GROUPS, NUM_ROWS)
    pair = scale_inputs_triton(x, memory.buffer, table, tiles), scale_inputs(x, segments)
    expected = x.clone()
    scale_outputs_(expected, segments)
    scale_outputs_triton_(x, memory.buffer, table, tiles)
    return [pair, (x, expected)]


def _bottleneck(size: int, norm: Any, *where: Any) -> list[Pair]:
    dtype, device, draw = where
    memory = _FlatBuffer((2 * RANK + 4) * size, dtype, device, draw)
    take = memory.take
    factors = (take(RANK, size), take(size, RANK), take(RANK), take(size), take(size), take(size))
    bottleneck = BottleneckAtSite(*factors, norm, "gelu", 0.5, "sum")
    out, residual = _rows(size, dtype, device, draw), _rows(size, dtype, device, draw)
    expected, table = out.clone(), _table(records.bottleneck_record(bottleneck), records.BOTTLENECK_FIELDS, device)
    add_grouped_bottleneck_(expected, residual, [BottleneckSegment(start, end, bottleneck) for _, start, end in GROUPS])
    tiles = tiles_on(device, GROUPS, NUM_ROWS)
    add_grouped_bottleneck_triton_(out, residual, memory.buffer, table, tiles, RANK, has_post_norm=norm == "post")
    return [(out, expected)]


def _attention(
    twin: Callable[..., Tensor], lengths: list[tuple[int, int]], group: int, head_dim: int, *where: Any
) -> list[Pair]:
    dtype, device, draw, causal, window, bias = where
    queries, contexts = zip(*lengths, strict=True)
    block_size = 16
    widths = [ceil_div(context, block_size) for context in contexts]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    tables = [range(end - width, end) for end, width in zip(ends, widths, strict=True)]
    layout = PagedLayout(queries, contexts, tables, block_size, device)
    q = torch.randn(sum(queries), 2 * group, head_dim, generator=draw).to(device, dtype)
    shape = (ends[-1] * block_size, 2, head_dim)
    keys, values = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
    arguments: Any = (q, keys, values, layout, head_dim**-0.5, causal, window, bias)
    return [(paged_attention_triton(*arguments), twin(*arguments))]
