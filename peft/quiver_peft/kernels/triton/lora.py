"""Grouped LoRA in Triton: a split-K shrink into planes of partial sums, and an expand that sums the planes."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from quiver_peft.kernels.triton.launch import batch_regimes, split_k
from quiver_peft.kernels.triton.records import LORA_EXPAND, LORA_FIELDS, LORA_HEAD
from quiver_peft.kernels.triton.tiles import Tiles

FIELDS, HEAD, EXPAND = tl.constexpr(LORA_FIELDS), tl.constexpr(LORA_HEAD), tl.constexpr(LORA_EXPAND)


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def lora_shrink_kernel(
    x,
    arena,
    table,
    tiles,
    planes,
    num_inputs,
    x_stride,
    num_rows,
    max_rank,
    PLANE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """planes[p, row, rank] = the part of x Aᵀ that inputs [p · PLANE, (p + 1) · PLANE) make."""
    tile = tiles + 3 * tl.program_id(0)
    first_rank = tl.program_id(1) * BLOCK_R
    plane = tl.program_id(2)
    record = table + tl.load(tile).to(tl.int64) * FIELDS
    rank = tl.load(record).to(tl.int32)
    if first_rank < rank:
        a = arena + tl.load(record + 1)
        count = tl.load(tile + 2)
        rows = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
        is_row = tl.arange(0, BLOCK_M) < count
        ranks = first_rank + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for block in range(0, PLANE, BLOCK_K):
            inputs = plane * PLANE + block + tl.arange(0, BLOCK_K)
            is_input = inputs < num_inputs
            xs = tl.load(
                x + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :],
                mask=is_row[:, None] & is_input[None, :],
                other=0.0,
            )
            weights = tl.load(
                a + ranks.to(tl.int64)[:, None] * num_inputs + inputs[None, :],
                mask=(ranks < rank)[:, None] & is_input[None, :],
                other=0.0,
            )
            if DOT:
                acc = tl.dot(xs.to(DOT_TYPE), tl.trans(weights.to(DOT_TYPE)), acc, input_precision="ieee")
            else:
                acc += tl.sum(xs.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :], axis=2)
        out = planes + (plane * num_rows + rows).to(tl.int64)[:, None] * max_rank + ranks[None, :]
        tl.store(out, acc, mask=is_row[:, None] & (ranks < rank)[None, :])


@triton.jit
def _add_target(
    acc,
    planes,
    b_t,
    first,
    last,
    rows,
    is_row,
    outputs,
    is_output,
    num_outputs,
    num_rows,
    max_rank,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """One target's ranks [first, last): acc + the sum of the planes · Bᵀ."""
    for block in range(first, last, BLOCK_R):
        ranks = block + tl.arange(0, BLOCK_R)
        is_rank = ranks < last
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for plane in tl.static_range(NUM_PLANES):
            low += tl.load(
                planes + (plane * num_rows + rows)[:, None] * max_rank + ranks[None, :],
                mask=is_row[:, None] & is_rank[None, :],
                other=0.0,
            )
        weights = tl.load(
            b_t + (ranks - first).to(tl.int64)[:, None] * num_outputs + outputs[None, :],
            mask=is_rank[:, None] & is_output[None, :],
            other=0.0,
        )
        if DOT:
            acc = tl.dot(low.to(DOT_TYPE), weights.to(DOT_TYPE), acc, input_precision="ieee")
        else:
            acc += tl.sum(low[:, :, None] * weights.to(tl.float32)[None, :, :], axis=1)
    return acc


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def lora_expand_kernel(
    y,
    arena,
    table,
    tiles,
    planes,
    num_outputs,
    y_stride,
    num_rows,
    max_rank,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """y[row, outputs of a target] += the sum of the row's planes · Bᵀ, for every target at the site."""
    tile = tiles + 3 * tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_N
    record = table + tl.load(tile).to(tl.int64) * FIELDS
    num_expands = tl.load(record + 2).to(tl.int32)
    if num_expands > 0:
        rows = (tl.load(tile + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
        is_row = tl.arange(0, BLOCK_M) < tl.load(tile + 2)
        columns = first_column + tl.arange(0, BLOCK_N)
        touched = columns < 0
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for index in range(0, num_expands):
            expand = record + HEAD + EXPAND * index
            first = tl.load(expand).to(tl.int32)
            last = tl.load(expand + 1).to(tl.int32)
            start = tl.load(expand + 2).to(tl.int32)
            end = tl.load(expand + 3).to(tl.int32)
            b_t = arena + tl.load(expand + 4)
            is_output = (columns >= start) & (columns < end)
            if (start < first_column + BLOCK_N) & (end > first_column):
                touched = touched | is_output
                acc = _add_target(
                    acc, planes, b_t, first, last, rows, is_row, columns - start, is_output, end - start,
                    num_rows, max_rank, NUM_PLANES, BLOCK_M, BLOCK_R, DOT, DOT_TYPE,
                )  # fmt: skip
        out = y + rows[:, None] * y_stride + columns[None, :]
        mask = is_row[:, None] & touched[None, :]
        total = tl.load(out, mask=mask, other=0.0).to(tl.float32) + acc
        tl.store(out, total.to(y.dtype.element_ty), mask=mask)


def add_grouped_lora_triton_(y: Tensor, x: Tensor, arena: Tensor, table: Tensor, tiles: Tiles, max_rank: int) -> None:
    """y[rows] += scale · (x[rows] Aᵀ) Bᵀ for each tile, in place. x: [T, K], y: [T, N], rows contiguous.

    arena: the adapter memory, [any]. table: the site's LoRA records, [rows of the tables, LORA_FIELDS] int64.
    max_rank: of all records; it sizes the sums between the two kernels, no weight is padded to it.
    """
    (num_rows, num_inputs), num_outputs = x.shape, y.shape[1]
    plane, num_planes = split_k(num_inputs)
    planes = torch.empty(num_planes, num_rows, max_rank, dtype=torch.float32, device=x.device)
    for part, sizes in batch_regimes(tiles, x.dtype):
        shared = (arena, table, part, planes)
        lora_shrink_kernel[len(part), triton.cdiv(max_rank, sizes["BLOCK_R"]), num_planes](
            x, *shared, num_inputs, x.stride(0), num_rows, max_rank, PLANE=plane, BLOCK_K=min(128, plane), **sizes
        )
        lora_expand_kernel[len(part), triton.cdiv(num_outputs, 128)](
            y, *shared, num_outputs, y.stride(0), num_rows, max_rank, NUM_PLANES=num_planes, BLOCK_N=128, **sizes
        )
