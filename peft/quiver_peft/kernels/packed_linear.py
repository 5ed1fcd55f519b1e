"""Linear with a weight packed for SIMD: panels of 16 outputs, each [K, 16]."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.cpp.library import library, library_for
from quiver_peft.rounding import round_up

PANEL = 16


class PackedWeight(NamedTuple):
    """panels: [ceil(N / 16), K, 16] fp32, the last panel zero-padded: a weight [N, K], rearranged."""

    panels: Tensor
    out_features: int

    def plain(self) -> Tensor:
        """A copy of the plain weight, [N, K]."""
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()


def packed_size(weight: Tensor) -> int:
    """The number of elements of the panels of a weight [N, K]."""
    return round_up(weight.shape[0], PANEL) * weight.shape[1]


def pack_weight(weight: Tensor, memory: Tensor) -> PackedWeight:
    """Rearrange a weight [N, K] into `memory` [packed_size(weight)]."""
    num_outputs, num_inputs = weight.shape
    panels = memory.view(-1, num_inputs, PANEL)
    cpp = library()
    if cpp is not None and library_for(weight, memory) is not None and weight.stride(1) == 1:
        cpp.pack(weight.data_ptr(), weight.stride(0), num_outputs, num_inputs, panels.data_ptr())
    else:
        padded = F.pad(weight, (0, 0, 0, len(panels) * PANEL - num_outputs))
        panels.copy_(padded.unflatten(0, (-1, PANEL)).transpose(1, 2))
    return PackedWeight(panels, num_outputs)


def can_pack(weight: Tensor) -> bool:
    """Whether packing makes this weight's linear faster: fp32 on a CPU with compiled kernels."""
    return weight.is_cpu and weight.dtype == torch.float32 and library() is not None


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b. x: [*, K] -> [*, N]. Batch-invariant with the compiled kernel."""
    cpp = library_for(x, weight.panels)
    if cpp is None:
        return packed_linear_torch(x, weight, bias)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, num_inputs = rows.shape
    y = cpp.empty((num_rows, weight.out_features))
    cpp.linear(
        rows.data_ptr(), rows.stride(0), weight.panels.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), weight.out_features, num_rows, weight.out_features, num_inputs,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.out_features)


def packed_linear_torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.plain(), bias)
