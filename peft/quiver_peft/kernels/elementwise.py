"""Element-wise kernels: embedding look-up, norms, rotary positions, activations, sums, argmax."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.cpp.library import library_for
from quiver_peft.kernels.storage import storage_number

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
# As quiver_activate of elementwise.cpp numbers them.
_CPP_KINDS: dict[Activation, int] = {"silu": 0, "relu": 1, "relu2": 2, "gelu_tanh": 3, "gelu": 4}


def embedding(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding, widened to `dtype`. table: [V, D], ids: [*] int64 -> [*, D].

    An id out of range raises (torch) or gives NaN.
    """
    cpp, storage = library_for(), storage_number(table)
    is_plain = table.is_contiguous() and ids.is_contiguous() and dtype == torch.float32
    if cpp is None or storage is None or not is_plain:
        return F.embedding(ids, table).to(dtype)
    out = cpp.empty((*ids.shape, table.shape[1]))
    address, width = table.data_ptr(), table.shape[1]
    cpp.gather(address, storage, 1, len(table), ids.data_ptr(), out.data_ptr(), ids.numel(), width)
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, which have one shape, [*, D]."""
    cpp = library_for(x, y)
    if cpp is None or not (x.is_contiguous() and y.is_contiguous()):
        return x + y
    out, width = cpp.empty(x.shape), x.shape[-1]
    cpp.add(x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel() // width, width)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight, statistics in fp32 (Zhang & Sennrich 2019). x: [*, D] -> [*, D]."""
    cpp = library_for(x, weight)
    if cpp is None:
        return rms_norm_torch(x, weight, eps)
    x, step = _with_packed_heads(x)
    heads, width = (1, x.shape[-1]) if x.dim() < 3 else x.shape[-2:]
    out = cpp.empty(x.shape)
    num_rows = x.numel() // (heads * width)
    cpp.rms_norm(x.data_ptr(), step, weight.data_ptr(), eps, out.data_ptr(), num_rows, heads, width)
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """(x - mean) / deviation · (weight + weight_offset) + bias (Ba et al. 2016). x: [*, D] -> [*, D]."""
    cpp = library_for(x, weight)
    if cpp is None or not x.is_contiguous():
        return layer_norm_torch(x, weight, bias, eps, weight_offset)
    out, width = cpp.empty(x.shape), x.shape[-1]
    cpp.layer_norm(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), weight_offset, eps, out.data_ptr(), x.numel() // width, width
    )
    return out


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    return F.layer_norm(x, weight.shape, weight + weight_offset if weight_offset else weight, bias, eps)


def activate(kind: Activation, x: Tensor, *, gated: bool) -> Tensor:
    """act(x), or of both halves of x act(first) · second (Shazeer 2020). x: [*, F] or gated [*, 2 F] -> [*, F]."""
    cpp = library_for(x)
    if cpp is None:
        return activate_torch(kind, x, gated=gated)
    x = x.contiguous()
    size = x.shape[-1]
    width = size // 2 if gated else size
    out = cpp.empty((*x.shape[:-1], width))
    cpp.activate(x.data_ptr(), size, out.data_ptr(), x.numel() // size, width, gated, _CPP_KINDS[kind])
    return out


def activate_torch(kind: Activation, x: Tensor, *, gated: bool) -> Tensor:
    if gated:
        # One split, not two slices: the backward pass of a slice fills a whole [*, 2 F] with zeros.
        gate, up = x.split(x.shape[-1] // 2, -1)
        return _act(kind, gate) * up
    return _act(kind, x)


def _act(kind: Activation, x: Tensor) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def rope_cos_sin(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position · frequency, each angle twice, times `factor`, fp32.

    positions: [*] int64; frequencies: [dim / 2] fp32 -> cos, sin: [*, 1, dim], to be broadcast over heads.
    """
    cpp = library_for(frequencies)
    if cpp is None or not positions.is_contiguous():
        return rope_cos_sin_torch(positions, frequencies, factor)
    half = len(frequencies)
    cos, sin = (cpp.empty((*positions.shape, 1, 2 * half)) for _ in range(2))
    cpp.rotary(
        positions.data_ptr(), frequencies.data_ptr(), factor, cos.data_ptr(), sin.data_ptr(), positions.numel(), half
    )
    return cos, sin


def rope_cos_sin_torch(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` features of every head, the two halves being the pairs (Su et al. 2021, as Llama has it).

    x: [*, H, E]; cos, sin: [*, 1, dim] -> [*, H, E].
    """
    cpp = library_for(x, cos, sin)
    if cpp is None:
        return apply_rope_torch(x, cos, sin)
    x, step = _with_packed_heads(x)
    heads, size = x.shape[-2:]
    out = cpp.empty(x.shape)
    num_rows = x.numel() // (heads * size)
    cpp.rotate(x.data_ptr(), step, out.data_ptr(), num_rows, heads, size, cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
    return out


def apply_rope_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def argmax_finite(x: Tensor) -> Tensor:
    """The first index of each row's maximum; -1 where the maximum is not finite. x: [T, V] -> [T] int64."""
    cpp = library_for(x)
    if cpp is None or not x.is_contiguous():
        return argmax_finite_torch(x)
    out = torch.empty(len(x), dtype=torch.int64)
    cpp.best(x.data_ptr(), out.data_ptr(), *x.shape)
    return out


def argmax_finite_torch(x: Tensor) -> Tensor:
    best, ids = x.max(-1)  # a NaN in a row is its maximum
    return torch.where(best.isfinite(), ids, -1)


def _with_packed_heads(x: Tensor) -> tuple[Tensor, int]:
    """x with contiguous heads and its row stride; copied unless x is [T, H, E] with gaps between rows only."""
    if x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1] if x.dim() < 3 else x.shape[-2] * x.shape[-1]
