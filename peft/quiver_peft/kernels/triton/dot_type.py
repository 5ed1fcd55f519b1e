"""In which number type the kernels multiply matrices."""

import torch
import triton
import triton.language as tl

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The tensors' own type, with fp32 sums. The interpreter, whose numpy knows no bfloat16, multiplies in fp32."""
    return tl.float32 if triton.knobs.runtime.interpret else _TYPES[dtype]
