"""The small operations between the products, each in one pass: norm, rotary positions, gated activation."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.native.library import library_for

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
_NATIVE_KINDS: dict[Activation, int] = {"silu": 0, "relu": 1, "relu2": 2, "gelu_tanh": 3}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight, statistics in fp32 (Zhang & Sennrich 2019). x: [*, D] -> [*, D]."""
    native = library_for(x, weight)
    if native is None:
        return rms_norm_torch(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    native.rms_norm(x.data_ptr(), size, weight.data_ptr(), eps, out.data_ptr(), x.numel() // size, size)
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The plain form."""
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def activate(kind: Activation, x: Tensor, *, gated: bool) -> Tensor:
    """act(x), or of both halves of x act(first) · second (Shazeer 2020). x: [*, F] or gated [*, 2 F] -> [*, F]."""
    native = library_for(x)
    if native is None or kind not in _NATIVE_KINDS:
        return activate_torch(kind, x, gated=gated)
    x = x.contiguous()
    size = x.shape[-1]
    width = size // 2 if gated else size
    out = torch.empty((*x.shape[:-1], width))
    native.activate(x.data_ptr(), size, out.data_ptr(), x.numel() // size, width, gated, _NATIVE_KINDS[kind])
    return out


def activate_torch(kind: Activation, x: Tensor, *, gated: bool) -> Tensor:
    """The plain form."""
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` features of every head, the two halves being the pairs (Su et al. 2021, as Llama has it).

    x: [*, H, E]; cos, sin: [*, 1, dim] -> [*, H, E].
    """
    native = library_for(x, cos, sin)
    if native is None:
        return rotate_torch(x, cos, sin)
    out = x.clone(memory_format=torch.contiguous_format)
    heads, size = x.shape[-2:]
    width = heads * size
    native.rotate(out.data_ptr(), width, x.numel() // width, heads, size, cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
    return out


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain form."""
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
