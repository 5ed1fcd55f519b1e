"""Decode attention (flash-decoding): one new row a sequence, its context split among programs and then combined."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import triton
import triton.language as tl

from quiver_peft.kernels.triton.softmax import LOG2_E, bias_columns, cache_rows, online_softmax_step


@triton.jit(do_not_specialize=["window", "table_stride"])
def single_rows_kernel(
    q, keys, values, out, query_starts, context_lengths, tables, bias, partial, partial_sums, scale, window, limit,
    q_stride, key_stride, value_stride, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    IS_SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
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
            cached = cache_rows(tables + sequence * table_stride, positions, length, BLOCK_SIZE)
            is_seen = (positions >= first) & (positions < end)
            mask = is_seen[:, None] & (features < HEAD_DIM)[None, :]
            place = kv_head * HEAD_DIM + features[None, :]
            k = tl.load(keys + cached[:, None] * key_stride + place, mask=mask, other=0.0).to(DOT_TYPE)
            v = tl.load(values + cached[:, None] * value_stride + place, mask=mask, other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if HAS_BIAS:
                column = bias_columns(positions - length + 1, limit)
                at_bias = bias + heads[:, None] * (2 * limit + 1) + column[None, :]
                scores += tl.load(at_bias, mask=(in_group < GROUP)[:, None] & is_seen[None, :], other=0.0)
            scores = tl.where(is_seen[None, :], scores * LOG2_E, float("-inf"))
            top, total, acc = online_softmax_step(scores, v, top, total, acc, DOT_TYPE)
        head_row = sequence * tl.num_programs(1) * GROUP + heads
        if IS_SPLIT:
            at = (head_row * tl.num_programs(2) + split).to(tl.int64)
            tl.store(partial + at[:, None] * HEAD_DIM + features[None, :], acc, mask=is_q)
            tl.store(partial_sums + 2 * at, top, mask=in_group < GROUP)
            tl.store(partial_sums + 2 * at + 1, total, mask=in_group < GROUP)
        else:
            to = row.to(tl.int64) * tl.num_programs(1) * GROUP * HEAD_DIM + at
            tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_q)


@triton.jit(do_not_specialize=["window", "num_splits"])
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
