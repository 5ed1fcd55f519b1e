"""Triton kernels for CUDA. Each is tested against its plain torch form, also in Triton's interpreter."""
