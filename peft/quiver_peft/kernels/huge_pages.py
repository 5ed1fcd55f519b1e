"""Allocation in huge pages, for weights and caches that every step streams through."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quiver_peft.kernels.cpp.library import library


def empty_huge(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; on a CPU in transparent huge pages where the system has them, which saves TLB misses."""
    memory = torch.empty(*shape, dtype=dtype, device=device)
    cpp = library()
    if cpp is not None and memory.is_cpu:
        cpp.use_large_pages(memory.data_ptr(), memory.nbytes)
    return memory
