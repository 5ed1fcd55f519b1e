"""Attention to cache blocks in Triton: single rows with their context split among programs, and chunks of rows."""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from quiver_peft.kernels.paged_attention import PagedLayout
from quiver_peft.kernels.triton.launch import dot_type

LOG2_E = tl.constexpr(1.4426950408889634)
# One program reads so many tokens of a context: by the context's length alone, so that no sum depends on the batch.
SPLIT_TOKENS = 256


@triton.jit
def _cache_rows(table, positions, length, BLOCK_SIZE: tl.constexpr):
    """Where a sequence's tokens lie in the cache."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < length, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _take_in(scores, values, top, total, acc, DOT_TYPE: tl.constexpr):
    """One block of keys more in a running softmax (Milakov & Gimelshein 2018). scores: in units of log 2, -inf: unseen."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    kept = tl.exp2(top - safe_top)
    total = total * kept + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(DOT_TYPE), values.to(DOT_TYPE), acc * kept[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def single_rows_kernel(
    q,
    keys,
    values,
    out,
    query_starts,
    context_lengths,
    tables,
    bias,
    partial,
    partial_sums,
    scale,
    window,
    limit,
    q_stride,
    key_stride,
    value_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """The query heads of one key-value head of a sequence with one new row, over tokens [split · SPLIT, + SPLIT)."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_starts + sequence)
    length = tl.load(context_lengths + sequence)
    first = tl.maximum(length - window, 0)
    begin = tl.maximum(split * SPLIT, first // BLOCK_S * BLOCK_S)
    end = tl.minimum(split * SPLIT + SPLIT, length)
    if (tl.load(query_starts + sequence + 1) - row == 1) & (begin < end):
        in_group = tl.arange(0, BLOCK_H)
        heads = kv_head * GROUP + in_group
        features = tl.arange(0, BLOCK_E)
        is_q = (in_group < GROUP)[:, None] & (features < HEAD_DIM)[None, :]
        at = heads[:, None] * HEAD_DIM + features[None, :]
        query = tl.load(q + row.to(tl.int64) * q_stride + at, mask=is_q, other=0.0).to(DOT_TYPE)
        top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
        for block in range(begin, end, BLOCK_S):
            positions = block + tl.arange(0, BLOCK_S)
            cached = _cache_rows(tables + sequence * table_stride, positions, length, BLOCK_SIZE)
            is_seen = (positions >= first) & (positions < end)
            mask = is_seen[:, None] & (features < HEAD_DIM)[None, :]
            place = kv_head * HEAD_DIM + features[None, :]
            k = tl.load(keys + cached[:, None] * key_stride + place, mask=mask, other=0.0).to(DOT_TYPE)
            v = tl.load(values + cached[:, None] * value_stride + place, mask=mask, other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if HAS_BIAS:
                distance = tl.maximum(tl.minimum(positions - length + 1, limit), -limit) + limit
                column = bias + heads[:, None] * (2 * limit + 1) + distance[None, :]
                scores += tl.load(column, mask=(in_group < GROUP)[:, None] & is_seen[None, :], other=0.0)
            scores = tl.where(is_seen[None, :], scores * LOG2_E, float("-inf"))
            top, total, acc = _take_in(scores, v, top, total, acc, DOT_TYPE)
        head_row = sequence * tl.num_programs(1) * GROUP + heads
        if IS_SPLIT:
            at = (head_row * tl.num_programs(2) + split).to(tl.int64)
            tl.store(partial + at[:, None] * HEAD_DIM + features[None, :], acc, mask=is_q)
            tl.store(partial_sums + 2 * at, top, mask=in_group < GROUP)
            tl.store(partial_sums + 2 * at + 1, total, mask=in_group < GROUP)
        else:
            to = row.to(tl.int64) * tl.num_programs(1) * GROUP * HEAD_DIM + at
            tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_q)


@triton.jit
def sum_splits_kernel(
    partial,
    partial_sums,
    out,
    query_starts,
    context_lengths,
    window,
    num_splits,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One head of a single row: the splits of its context, weighted by their shares of the softmax's sum."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    length = tl.load(context_lengths + sequence)
    if tl.load(query_starts + sequence + 1) - row == 1:
        features = tl.arange(0, BLOCK_E)
        mask = features < HEAD_DIM
        first = (sequence * tl.num_programs(1) + head).to(tl.int64) * num_splits
        begin, end = tl.maximum(length - window, 0) // SPLIT, tl.cdiv(length, SPLIT)
        top = tl.load(partial_sums + 2 * (first + begin))
        total = tl.load(partial_sums + 2 * (first + begin) + 1)
        acc = tl.load(partial + (first + begin) * HEAD_DIM + features, mask=mask, other=0.0)
        for split in range(begin + 1, end):
            next_top = tl.load(partial_sums + 2 * (first + split))
            new_top = tl.maximum(top, next_top)
            kept, share = tl.exp2(top - new_top), tl.exp2(next_top - new_top)
            total = total * kept + tl.load(partial_sums + 2 * (first + split) + 1) * share
            part = tl.load(partial + (first + split) * HEAD_DIM + features, mask=mask, other=0.0)
            acc = acc * kept + part * share
            top = new_top
        to = (row.to(tl.int64) * tl.num_programs(1) + head) * HEAD_DIM + features
        tl.store(out + to, (acc / total).to(out.dtype.element_ty), mask=mask)


@triton.jit
def chunk_rows_kernel(
    q,
    keys,
    values,
    out,
    query_starts,
    context_lengths,
    tables,
    bias,
    scale,
    window,
    limit,
    q_stride,
    key_stride,
    value_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """One head of BLOCK_M rows of a sequence with several new rows."""
    sequence, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_starts + sequence)
    num_new = tl.load(query_starts + sequence + 1) - start
    if (num_new > 1) & (tile * BLOCK_M < num_new):
        length = tl.load(context_lengths + sequence)
        local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query_positions = length - num_new + local
        begin, end = 0, length
        if IS_CAUSAL:
            begin = tl.maximum(length - num_new + tile * BLOCK_M - window + 1, 0) // BLOCK_S * BLOCK_S
            end = tl.minimum(length, length - num_new + (tile + 1) * BLOCK_M)
        features = tl.arange(0, BLOCK_E)
        is_q = (local < num_new)[:, None] & (features < HEAD_DIM)[None, :]
        rows = (start + local).to(tl.int64)[:, None]
        query = tl.load(q + rows * q_stride + head * HEAD_DIM + features[None, :], mask=is_q, other=0.0).to(DOT_TYPE)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for block in range(begin, end, BLOCK_S):
            positions = block + tl.arange(0, BLOCK_S)
            cached = _cache_rows(tables + sequence * table_stride, positions, length, BLOCK_SIZE)
            mask = (positions < length)[:, None] & (features < HEAD_DIM)[None, :]
            place = head // GROUP * HEAD_DIM + features[None, :]
            k = tl.load(keys + cached[:, None] * key_stride + place, mask=mask, other=0.0).to(DOT_TYPE)
            v = tl.load(values + cached[:, None] * value_stride + place, mask=mask, other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            distances = positions[None, :] - query_positions[:, None]
            if HAS_BIAS:
                column = head * (2 * limit + 1) + tl.maximum(tl.minimum(distances, limit), -limit) + limit
                scores += tl.load(bias + column)
            is_seen = tl.broadcast_to((positions < length)[None, :], distances.shape)
            if IS_CAUSAL:
                is_seen = is_seen & (distances <= 0) & (distances > -window)
            scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
            top, total, acc = _take_in(scores, v, top, total, acc, DOT_TYPE)
        to = (rows * tl.num_programs(2) + head) * HEAD_DIM + features[None, :]
        total = tl.where(total > 0, total, 1.0)  # rows past the chunk's end may have seen nothing
        tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_q)


def paged_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PagedLayout,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """As `paged_attention`: q: [T, H, E]; keys, values: [C, G, E]; bias: [H, 2 · limit + 1] or None -> [T, H, E].

    Heads and features must be contiguous. What is launched follows from lengths that the host knows: nothing is waited
    for.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_sequences = keys.shape[1], len(layout.lengths)
    out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    longest = max(layout.lengths)
    shared = {
        "scale": scale,
        "window": longest if window is None else window,
        "limit": 0 if bias is None else bias.shape[1] // 2,
        "q_stride": q.stride(0),
        "key_stride": keys.stride(0),
        "value_stride": values.stride(0),
        "table_stride": layout.tables.stride(0),
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "HAS_BIAS": bias is not None,
        "BLOCK_SIZE": layout.block_size,
        "BLOCK_E": max(16, triton.next_power_of_2(head_dim)),
        "DOT_TYPE": dot_type(q.dtype),
    }
    where = (q, keys, values, out, layout.query_starts, layout.context_lengths, layout.tables)
    bias = q if bias is None else bias
    longest_chunk = max(layout.query_lengths)
    if longest_chunk > 1:
        block = 64 if q.element_size() == 2 else 32
        grid = (num_sequences, triton.cdiv(longest_chunk, block), num_heads)
        chunk_rows_kernel[grid](*where, bias, IS_CAUSAL=causal, BLOCK_M=block, BLOCK_S=block, **shared, num_stages=2)
    if 1 in layout.query_lengths:
        num_splits = triton.cdiv(longest, SPLIT_TOKENS)
        is_split = num_splits > 1
        parts = num_sequences * num_heads * num_splits if is_split else 0
        partial = torch.empty(parts, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(parts, 2, dtype=torch.float32, device=q.device)
        group_block = max(16, triton.next_power_of_2(num_heads // num_kv_heads))
        single_rows_kernel[num_sequences, num_kv_heads, num_splits](
            *where, bias, partial, sums, SPLIT=SPLIT_TOKENS, IS_SPLIT=is_split, BLOCK_H=group_block, BLOCK_S=64, **shared
        )
        if is_split:
            sum_splits_kernel[num_sequences, num_heads](
                partial,
                sums,
                out,
                layout.query_starts,
                layout.context_lengths,
                shared["window"],
                num_splits,
                HEAD_DIM=head_dim,
                SPLIT=SPLIT_TOKENS,
                BLOCK_E=shared["BLOCK_E"],
            )
    return out
