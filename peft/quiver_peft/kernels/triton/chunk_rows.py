"""Attention of prefill chunks: sequences with several new rows."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import triton
import triton.language as tl

from quiver_peft.kernels.triton.softmax import LOG2_E, bias_columns, cache_rows, online_softmax_step


@triton.jit(do_not_specialize=["window", "table_stride"])
def chunk_rows_kernel(
    q, keys, values, out, query_starts, context_lengths, tables, bias, scale, window, limit, q_stride, key_stride,
    value_stride, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_SIZE:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
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
            cached = cache_rows(tables + sequence * table_stride, positions, length, BLOCK_SIZE)
            mask = (positions < length)[:, None] & (features < HEAD_DIM)[None, :]
            place = head // GROUP * HEAD_DIM + features[None, :]
            k = tl.load(keys + cached[:, None] * key_stride + place, mask=mask, other=0.0).to(DOT_TYPE)
            v = tl.load(values + cached[:, None] * value_stride + place, mask=mask, other=0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            distances = positions[None, :] - query_positions[:, None]
            if HAS_BIAS:
                scores += tl.load(bias + head * (2 * limit + 1) + bias_columns(distances, limit))
            is_seen = tl.broadcast_to((positions < length)[None, :], distances.shape)
            if IS_CAUSAL:
                is_seen = is_seen & (distances <= 0) & (distances > -window)
            scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
            top, total, acc = online_softmax_step(scores, v, top, total, acc, DOT_TYPE)
        to = (rows * tl.num_programs(2) + head) * HEAD_DIM + features[None, :]
        total = tl.where(total > 0, total, 1.0)  # rows past the chunk's end may have seen nothing
        tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_q)
