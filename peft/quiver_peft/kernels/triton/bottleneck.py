"""Grouped bottlenecks in Triton: norm and split-K down-projection into planes; sum, activation and up-projection."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from quiver_peft.kernels.grouped_bottleneck import NORM_EPS
from quiver_peft.kernels.triton.launch import batch_regimes, split_k
from quiver_peft.kernels.triton.records import ACTIVATIONS, BOTTLENECK_FIELDS, NORMS, SOURCES
from quiver_peft.kernels.triton.tiles import Tiles

FIELDS = tl.constexpr(BOTTLENECK_FIELDS)
PRE, POST = tl.constexpr(NORMS.index("pre")), tl.constexpr(NORMS.index("post"))
SUM, RESIDUAL = tl.constexpr(SOURCES.index("sum")), tl.constexpr(SOURCES.index("residual"))
SWISH, RELU = tl.constexpr(ACTIVATIONS.index("swish")), tl.constexpr(ACTIVATIONS.index("relu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _source(out, residual, arena, record, rows, columns, mask, hidden_size):
    """The bottleneck's input, rounded to the weights' type, as fp32."""
    source, out_bias = tl.load(record + 9), tl.load(record + 11)
    at = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    u = tl.zeros(at.shape, tl.float32)
    if source != RESIDUAL:
        u += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    if (source == SUM) | (source == RESIDUAL):
        u += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    u = u.to(arena.dtype.element_ty).to(tl.float32)
    if out_bias >= 0:
        left_out = tl.load(arena + out_bias + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)
        u = (u - left_out[None, :]).to(arena.dtype.element_ty).to(tl.float32)
    return u


@triton.jit
def _statistics(out, residual, arena, record, rows, is_row, hidden_size, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and reciprocal standard deviation of each row's bottleneck input."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(0, hidden_size, BLOCK_K):
        inputs = block + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (inputs < hidden_size)[None, :]
        total += tl.sum(_source(out, residual, arena, record, rows, inputs, mask, hidden_size), axis=1)
    mean = total / hidden_size
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(0, hidden_size, BLOCK_K):
        inputs = block + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (inputs < hidden_size)[None, :]
        u = _source(out, residual, arena, record, rows, inputs, mask, hidden_size)
        centred = tl.where(mask, u - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    return mean, 1.0 / tl.sqrt(squares / hidden_size + EPS)


@triton.jit
def _sigmoid(x):
    decayed = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0.0, 1.0, decayed) / (1.0 + decayed)


@triton.jit
def _activate(kind, x):
    result = x * _sigmoid(x)
    if kind == RELU:
        result = tl.maximum(x, 0.0)
    elif kind == GELU:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind != SWISH:
        # 0.5 · x · (1 + tanh(z)) = x · sigmoid(2z), with z = sqrt(2 / pi) · (x + 0.044715 x³)
        result = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return result


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def bottleneck_down_kernel(
    out,
    residual,
    arena,
    table,
    tiles,
    planes,
    hidden_size,
    num_rows,
    max_rank,
    PLANE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """planes[p, row, rank] = the part of down · norm(u) that inputs [p · PLANE, (p + 1) · PLANE) make."""
    tile = tiles + 3 * tl.program_id(0)
    first_rank = tl.program_id(1) * BLOCK_R
    plane = tl.program_id(2)
    record = table + tl.load(tile).to(tl.int64) * FIELDS
    rank = tl.load(record).to(tl.int32)
    if first_rank < rank:
        is_normed = tl.load(record + 7) == PRE
        rows = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
        is_row = tl.arange(0, BLOCK_M) < tl.load(tile + 2)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        rstd = tl.full((BLOCK_M,), 1.0, tl.float32)
        if is_normed:
            mean, rstd = _statistics(out, residual, arena, record, rows, is_row, hidden_size, BLOCK_M, BLOCK_K)
        ranks = first_rank + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for block in range(0, PLANE, BLOCK_K):
            inputs = plane * PLANE + block + tl.arange(0, BLOCK_K)
            is_input = inputs < hidden_size
            mask = is_row[:, None] & is_input[None, :]
            u = _source(out, residual, arena, record, rows, inputs, mask, hidden_size)
            if is_normed:
                weight = tl.load(arena + tl.load(record + 5) + inputs, mask=is_input, other=0.0).to(tl.float32)
                bias = tl.load(arena + tl.load(record + 6) + inputs, mask=is_input, other=0.0).to(tl.float32)
                u = (u - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
            down = tl.load(
                arena + tl.load(record + 1) + ranks.to(tl.int64)[:, None] * hidden_size + inputs[None, :],
                mask=(ranks < rank)[:, None] & is_input[None, :],
                other=0.0,
            )
            if DOT:
                acc = tl.dot(u.to(DOT_TYPE), tl.trans(down.to(DOT_TYPE)), acc, input_precision="ieee")
            else:
                acc += tl.sum(u[:, None, :] * down.to(tl.float32)[None, :, :], axis=2)
        at = planes + (plane * num_rows + rows).to(tl.int64)[:, None] * max_rank + ranks[None, :]
        tl.store(at, acc, mask=is_row[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def bottleneck_up_kernel(
    out,
    arena,
    table,
    tiles,
    planes,
    deltas,
    hidden_size,
    num_rows,
    max_rank,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """out += scale · (up · act(the sum of the planes)); what a norm comes after goes to `deltas` first."""
    tile = tiles + 3 * tl.program_id(0)
    record = table + tl.load(tile).to(tl.int64) * FIELDS
    rank = tl.load(record).to(tl.int32)
    if rank > 0:
        rows = (tl.load(tile + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
        is_row = tl.arange(0, BLOCK_M) < tl.load(tile + 2)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < hidden_size
        up, down_bias, up_bias = tl.load(record + 2), tl.load(record + 3), tl.load(record + 4)
        kind = tl.load(record + 8)
        bias = tl.load(arena + up_bias + columns, mask=is_column & (up_bias >= 0), other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
        for block in range(0, rank, BLOCK_R):
            ranks = block + tl.arange(0, BLOCK_R)
            is_rank = ranks < rank
            shift = tl.load(arena + down_bias + ranks, mask=is_rank & (down_bias >= 0), other=0.0).to(tl.float32)
            inner = tl.zeros((BLOCK_M, BLOCK_R), tl.float32) + shift[None, :]
            for plane in tl.static_range(NUM_PLANES):
                inner += tl.load(
                    planes + (plane * num_rows + rows)[:, None] * max_rank + ranks[None, :],
                    mask=is_row[:, None] & is_rank[None, :],
                    other=0.0,
                )
            inner = _activate(kind, inner)
            weights = tl.load(
                arena + up + columns.to(tl.int64)[:, None] * rank + ranks[None, :],
                mask=is_column[:, None] & is_rank[None, :],
                other=0.0,
            )
            if DOT:
                acc = tl.dot(inner.to(DOT_TYPE), tl.trans(weights.to(DOT_TYPE)), acc, input_precision="ieee")
            else:
                acc += tl.sum(inner[:, None, :] * weights.to(tl.float32)[None, :, :], axis=2)
        at = rows[:, None] * hidden_size + columns[None, :]
        mask = is_row[:, None] & is_column[None, :]
        if tl.load(record + 7) == POST:
            tl.store(deltas + at, acc, mask=mask)
        else:
            scale = tl.load(record + 10).to(tl.int32).to(tl.float32, bitcast=True)
            total = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) + acc * scale
            tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def bottleneck_norm_kernel(out, arena, table, records, deltas, hidden_size, BLOCK: tl.constexpr):
    """out += scale · norm(deltas) in the rows whose bottleneck ends with a norm."""
    row = tl.program_id(0)
    record = table + tl.load(records + row).to(tl.int64) * FIELDS
    if (tl.load(record) > 0) & (tl.load(record + 7) == POST):
        columns = tl.arange(0, BLOCK)
        mask = columns < hidden_size
        at = row.to(tl.int64) * hidden_size + columns
        delta = tl.load(deltas + at, mask=mask, other=0.0)
        centred = tl.where(mask, delta - tl.sum(delta, axis=0) / hidden_size, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / hidden_size + EPS)
        weight = tl.load(arena + tl.load(record + 5) + columns, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(arena + tl.load(record + 6) + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(record + 10).to(tl.int32).to(tl.float32, bitcast=True)
        total = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) + (centred * rstd * weight + bias) * scale
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def add_grouped_bottleneck_triton_(
    out: Tensor,
    residual: Tensor,
    arena: Tensor,
    table: Tensor,
    tiles: Tiles,
    max_rank: int,
    *,
    has_post_norm: bool,
) -> None:
    """out[rows] += its adapter's bottleneck, in place. out, residual: [T, D], contiguous.

    arena: the adapter memory. table: the site's bottleneck records, [rows of the tables, BOTTLENECK_FIELDS] int64.
    max_rank: of all records; it sizes the sums between the kernels, no weight is padded to it.
    has_post_norm: whether any of the batch's bottlenecks ends with a norm.
    """
    num_rows, hidden_size = out.shape
    plane, num_planes = split_k(hidden_size)
    planes = torch.empty(num_planes, num_rows, max_rank, dtype=torch.float32, device=out.device)
    deltas = torch.empty(num_rows if has_post_norm else 0, hidden_size, dtype=torch.float32, device=out.device)
    counts = (hidden_size, num_rows, max_rank)
    for part, sizes in batch_regimes(tiles, arena.dtype):
        bottleneck_down_kernel[len(part), triton.cdiv(max_rank, sizes["BLOCK_R"]), num_planes](
            out, residual, arena, table, part, planes, *counts, PLANE=plane, BLOCK_K=min(128, plane), **sizes
        )
        bottleneck_up_kernel[len(part), triton.cdiv(hidden_size, 64)](
            out, arena, table, part, planes, deltas, *counts, NUM_PLANES=num_planes, BLOCK_N=64, **sizes
        )
    if has_post_norm:
        block = triton.next_power_of_2(hidden_size)
        bottleneck_norm_kernel[num_rows,](out, arena, table, tiles.records, deltas, hidden_size, BLOCK=block)
