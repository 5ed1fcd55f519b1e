"""Paged attention in Triton: launches the kernels for chunks and for single rows."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Triton's kernels are a language of their own: untyped arguments, and numbers where it says `constexpr`.

from typing import Any

import torch
import triton
from torch import Tensor

from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.kernels.triton.chunk_rows import chunk_rows_kernel
from quiver_peft.kernels.triton.launch import dot_type
from quiver_peft.kernels.triton.single_rows import single_rows_kernel, sum_splits_kernel

# Tokens of a context that one program reads. Splits depend on the context's length alone: rows are batch-invariant.
SPLIT_TOKENS = 256


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

    Heads and features must be contiguous. Launches depend on lengths that the host knows: there is no
    synchronization.
    """
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    sizes = {
        "scale": scale,
        "window": max(layout.lengths) if window is None else window,
        "limit": 0 if bias is None else bias.shape[1] // 2,
        "q_stride": q.stride(0),
        "key_stride": keys.stride(0),
        "value_stride": values.stride(0),
        "table_stride": layout.tables.stride(0),
        "GROUP": num_heads // keys.shape[1],
        "HEAD_DIM": head_dim,
        "HAS_BIAS": bias is not None,
        "BLOCK_SIZE": layout.block_size,
        "BLOCK_E": max(16, triton.next_power_of_2(head_dim)),
        "DOT_TYPE": dot_type(q.dtype),
    }
    where = (
        q,
        keys,
        values,
        out,
        layout.query_starts,
        layout.context_lengths,
        layout.tables,
        q if bias is None else bias,
    )
    longest_chunk = max(layout.query_lengths)
    if longest_chunk > 1:
        block = 64 if q.element_size() == 2 else 32
        grid = (len(layout.lengths), triton.cdiv(longest_chunk, block), num_heads)
        chunk_rows_kernel[grid](*where, IS_CAUSAL=causal, BLOCK_M=block, BLOCK_S=block, **sizes, num_stages=2)
    if 1 in layout.query_lengths:
        _single_rows(where, layout, keys.shape[1], sizes)
    return out


def _single_rows(where: tuple[Tensor, ...], layout: PagedLayout, num_kv_heads: int, sizes: dict[str, Any]) -> None:
    q, out = where[0], where[3]
    num_sequences, num_heads, head_dim = len(layout.lengths), q.shape[1], q.shape[2]
    num_splits = triton.cdiv(max(layout.lengths), SPLIT_TOKENS)
    is_split = num_splits > 1
    num_parts = num_sequences * num_heads * num_splits if is_split else 0
    parts = torch.empty(num_parts, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(num_parts, 2, dtype=torch.float32, device=q.device)
    heads = max(16, triton.next_power_of_2(sizes["GROUP"]))
    single_rows_kernel[num_sequences, num_kv_heads, num_splits](
        *where, parts, sums, SPLIT=SPLIT_TOKENS, IS_SPLIT=is_split, BLOCK_H=heads, BLOCK_S=64, **sizes
    )
    if is_split:
        rows = (layout.query_starts, layout.context_lengths)
        widths = {"HEAD_DIM": head_dim, "SPLIT": SPLIT_TOKENS, "BLOCK_E": sizes["BLOCK_E"]}
        sum_splits_kernel[num_sequences, num_heads](parts, sums, out, *rows, sizes["window"], num_splits, **widths)
