"""Tensors of adapters on the host."""

import torch
from torch import Tensor


def to_host_fp32(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy on the CPU, cut off from autograd."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
