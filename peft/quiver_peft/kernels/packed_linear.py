"""Linear with a weight packed for SIMD: panels of 16 outputs, each [K, 16]."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from quiver_peft.kernels.cpp.library import library, library_for
from quiver_peft.kernels.storage import storage_number
from quiver_peft.rounding import round_up

PANEL = 16


class PackedWeight(NamedTuple):
    """A weight [N, K] in the type that it is stored in.

    panels: [ceil(N / 16), K, 16], the last panel zero-padded.
    """

    panels: Tensor
    out_features: int

    def plain(self) -> Tensor:
        """A copy of the plain weight, [N, K]."""
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()


def packed_size(weight: Tensor) -> int:
    """The number of elements of the panels of a weight [N, K]."""
    return round_up(weight.shape[0], PANEL) * weight.shape[1]


def pack_weight(weight: Tensor, memory: Tensor) -> PackedWeight:
    """Rearrange a weight [N, K] into `memory` [packed_size(weight)], which has its type."""
    num_outputs, num_inputs = weight.shape
    panels = memory.view(-1, num_inputs, PANEL)
    cpp = library() if library_for() is not None else None
    if cpp is not None and storage_number(weight) is not None and weight.stride(1) == 1:
        address, size = weight.data_ptr(), weight.element_size()
        cpp.pack(address, weight.stride(0), num_outputs, num_inputs, panels.data_ptr(), size)
    else:
        padded = F.pad(weight, (0, 0, 0, len(panels) * PANEL - num_outputs))
        panels.copy_(padded.unflatten(0, (-1, PANEL)).transpose(1, 2))
    return PackedWeight(panels, num_outputs)


def can_pack(weight: Tensor) -> bool:
    """Whether packing makes this weight's linear faster: on a CPU with compiled kernels."""
    return storage_number(weight) is not None and library() is not None


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b. x: [*, K] -> [*, N]. Batch-invariant with the compiled kernel."""
    cpp = library_for(x)
    storage = storage_number(weight.panels)
    if cpp is None or storage is None:
        return packed_linear_torch(x, weight, bias)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, num_inputs = rows.shape
    y = cpp.empty((num_rows, weight.out_features))
    cpp.linear(
        rows.data_ptr(), rows.stride(0), weight.panels.data_ptr(), storage, 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), weight.out_features, num_rows, weight.out_features, num_inputs,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.out_features)


def packed_linear_torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The plain form: a weight that is stored in fewer bits is widened to the type of x."""
    return F.linear(x, weight.plain().to(x.dtype), bias)


def packed_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Rows of the weight in fp32, as of an embedding. ids: [*] int64 -> [*, K].

    An id out of range raises (torch) or gives NaN.
    """
    cpp, storage = library_for(), storage_number(weight.panels)
    if cpp is None or storage is None or not ids.is_contiguous():
        return weight.panels[ids // PANEL, :, ids % PANEL].float()
    address, width = weight.panels.data_ptr(), weight.panels.shape[1]
    out = cpp.empty((*ids.shape, width))
    cpp.gather(address, storage, PANEL, weight.out_features, ids.data_ptr(), out.data_ptr(), ids.numel(), width)
    return out
