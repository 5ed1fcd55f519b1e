"""Grouped scales in Triton: IA3's vectors and DoRA's magnitudes."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from quiver_peft.kernels.triton.records import SCALE_FIELDS, SCALE_HEAD, SCALE_OUT
from quiver_peft.kernels.triton.tiles import Tiles

FIELDS, HEAD, OUT = tl.constexpr(SCALE_FIELDS), tl.constexpr(SCALE_HEAD), tl.constexpr(SCALE_OUT)
BLOCK = 512


@triton.jit
def scale_inputs_kernel(x, arena, table, records, scaled, num_inputs, x_stride, BLOCK: tl.constexpr):
    """scaled[row] = x[row] · the scale on its adapter's input, or x[row]."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    record = table + tl.load(records + row).to(tl.int64) * FIELDS
    mask = columns < num_inputs
    values = tl.load(x + row.to(tl.int64) * x_stride + columns, mask=mask)
    if tl.load(record) != 0:
        scale = tl.load(arena + tl.load(record + 1) + columns, mask=mask)
        values = (values.to(tl.float32) * scale.to(tl.float32)).to(values.dtype)
    tl.store(scaled + row.to(tl.int64) * num_inputs + columns, values, mask=mask)


@triton.jit
def scale_outputs_kernel(y, arena, table, records, y_stride, num_outputs, BLOCK: tl.constexpr):
    """y[row, outputs] = scale · y + shift, for each of the adapter's scales in order."""
    row = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK
    record = table + tl.load(records + row).to(tl.int64) * FIELDS
    num_scales = tl.load(record + 2).to(tl.int32)
    if num_scales > 0:
        columns = first_column + tl.arange(0, BLOCK)
        out = y + row.to(tl.int64) * y_stride + columns
        values = tl.load(out, mask=columns < num_outputs, other=0.0).to(tl.float32)
        for index in range(0, num_scales):
            entry = record + HEAD + OUT * index
            start = tl.load(entry)
            mask = (columns >= start) & (columns < tl.load(entry + 1))
            values *= tl.load(arena + tl.load(entry + 2) + columns - start, mask=mask, other=1.0).to(tl.float32)
            shift = tl.load(entry + 3)
            values += tl.load(arena + shift + columns - start, mask=mask & (shift >= 0), other=0.0).to(tl.float32)
        tl.store(out, values.to(y.dtype.element_ty), mask=columns < num_outputs)


def scale_inputs_triton(x: Tensor, arena: Tensor, table: Tensor, tiles: Tiles) -> Tensor:
    """x[rows] · in_scale where the row's adapter has one. x: [T, K], rows contiguous -> [T, K], always a new tensor.

    arena: the adapter memory. table: the site's scale records, [rows of the tables, SCALE_FIELDS] int64.
    """
    num_rows, num_inputs = x.shape
    scaled = torch.empty(num_rows, num_inputs, dtype=x.dtype, device=x.device)
    grid = (num_rows, triton.cdiv(num_inputs, BLOCK))
    scale_inputs_kernel[grid](x, arena, table, tiles.records, scaled, num_inputs, x.stride(0), BLOCK=BLOCK)
    return scaled


def scale_outputs_triton_(y: Tensor, arena: Tensor, table: Tensor, tiles: Tiles) -> None:
    """y[rows, outputs] = scale · y + shift, in place. y: [T, N], rows contiguous."""
    num_rows, num_outputs = y.shape
    grid = (num_rows, triton.cdiv(num_outputs, BLOCK))
    scale_outputs_kernel[grid](y, arena, table, tiles.records, y.stride(0), num_outputs, BLOCK=BLOCK)
