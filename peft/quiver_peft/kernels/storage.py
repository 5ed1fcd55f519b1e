"""The types that frozen weights are stored in. What is computed is fp32 on a CPU whatever they are."""

import torch
from torch import Tensor

# By torch's type: its number in `cpp/storage.h`.
STORAGE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def storage_number(weight: Tensor) -> int | None:
    """How the compiled kernels know the type that a weight is stored in; None: they do not."""
    return STORAGE_NUMBERS.get(weight.dtype) if weight.is_cpu else None
