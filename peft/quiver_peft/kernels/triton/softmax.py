"""Shared by the attention kernels: cache addressing, relative bias, and the online softmax."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cache_rows(table, positions, length, BLOCK_SIZE: tl.constexpr):
    """The cache rows of a sequence's positions."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < length, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def bias_columns(distances, limit):
    """The column of T5's bias for keys `distances` positions after the query."""
    return tl.maximum(tl.minimum(distances, limit), -limit) + limit


@triton.jit
def online_softmax_step(scores, values, top, total, acc, DOT_TYPE: tl.constexpr):
    """One block of online softmax (Milakov & Gimelshein 2018). scores: in log 2 units; -inf where masked."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    kept = tl.exp2(top - safe_top)
    total = total * kept + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(DOT_TYPE), values.to(DOT_TYPE), acc * kept[:, None], input_precision="ieee")
    return new_top, total, acc
