"""Paged attention: packed rows attend to keys and values in cache blocks. Chooses Triton, C++ or plain torch.

B sequences follow one another in T packed rows; the other letters are those of `base/layers.py`.
"""

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.cpp.library import library_for
from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.kernels.storage import storage_number

_MAX_SHARING = 32  # the most query heads per key-value head that the compiled kernel takes


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Writes new keys and values into a layer's cache, rounded to its type.

    keys, values: [C, G, E]; k, v: [T, G, E]; rows: [T] int64.
    """
    cpp, storage = library_for(k, v), storage_number(keys)
    if (
        cpp is None
        or storage is None
        or not (_packs_heads(keys, values, k, v) and keys.is_contiguous() and values.is_contiguous())
    ):
        keys[rows] = k.to(keys.dtype)
        values[rows] = v.to(values.dtype)
        return
    cpp.store_rows(
        keys.data_ptr(), values.data_ptr(), storage, keys.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(),
        v.stride(0), rows.data_ptr(), len(rows),
    )  # fmt: skip


def _packs_heads(*tensors: Tensor) -> bool:
    """Whether the heads of a row [H, E] lie one after another."""
    return all(tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2] for tensor in tensors)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v of each row over its own sequence in the cache. q: [T, H, E] -> [T, H, E].

    keys, values: [C, G, E], one layer's cache, widened to q's type.
    causal: a row sees itself and earlier positions; else its whole sequence.
    window: a row sees this many positions, its own included; only with `causal`.
    bias: [H, 2 · limit + 1] fp32, added to the scores. Column limit + d is for keys d positions after the query; keys
        farther than `limit` take the outermost columns.
    """
    if q.is_cuda and check_triton_kernels(q.shape[1] // keys.shape[1], q.shape[2], q.dtype, q.device):
        from quiver_peft.kernels.triton.paged_attention import paged_attention_triton

        return paged_attention_triton(q, keys, values, layout, scale, causal, window, bias)
    cpp, storage = library_for(q), storage_number(keys)
    if (
        cpp is None
        or storage is None
        or not _packs_heads(q, keys, values)
        or q.shape[1] // keys.shape[1] > _MAX_SHARING
    ):
        return paged_attention_torch(q, keys, values, layout, scale, causal, window, bias)
    out = cpp.empty(q.shape)
    cpp.paged_attention(
        q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), storage, keys.stride(0), values.stride(0),
        out.data_ptr(), layout.address, q.shape[1], keys.shape[1], q.shape[2], scale, causal, window or 0,
        0 if bias is None else bias.data_ptr(), 0 if bias is None else bias.shape[1] // 2,
    )  # fmt: skip
    return out


@cache
def check_triton_kernels(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the Triton kernels agree with plain torch on this GPU, with `group` query heads per key-value head.

    Checked once; call it before the first request, because it compiles the kernels.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from quiver_peft.kernels.triton.self_check import check_attention_kernels

    return check_attention_kernels(paged_attention_torch, group, head_dim, dtype, device)


def paged_attention_torch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PagedLayout,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """`paged_attention` by torch's operators, one sequence after the other."""
    out = torch.empty_like(q)
    row = 0
    for sequence, (num_new, length) in enumerate(zip(layout.query_lengths, layout.lengths, strict=True)):
        cached = layout.cache_rows(sequence)
        rows = slice(row, row + num_new)
        mask = _mask(num_new, length, causal, window, bias, q)
        k, v = (part[cached].to(q.dtype).transpose(0, 1)[None] for part in (keys, values))
        # Query heads that share a key-value head are adjacent, as enable_gqa requires.
        attended = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1]
        )
        out[rows] = attended[0].transpose(0, 1)
        row += num_new
    return out


def _mask(
    num_new: int, length: int, causal: bool, window: int | None, bias: Tensor | None, like: Tensor
) -> Tensor | None:
    """The mask of a sequence's newest rows: [N, S] bool, or additive scores [H, N, S]; None: all is visible."""
    if bias is None and window is None and (not causal or num_new == 1):
        return None
    positions = torch.arange(length, device=like.device)
    distances = positions - positions[length - num_new :, None]
    hidden = distances > 0 if causal else torch.zeros_like(distances, dtype=torch.bool)
    if window is not None:
        hidden |= distances <= -window
    if bias is None:
        return ~hidden
    limit = bias.shape[1] // 2
    scores = bias[:, distances.clamp(-limit, limit) + limit]
    return scores.masked_fill(hidden, -torch.inf).to(like.dtype)
