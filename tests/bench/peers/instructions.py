"""Imported before vLLM, which asks torch at import which of its libraries the processor can run: AVX2's if told so."""

import os

import torch

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
    torch.cpu._is_avx512_supported = lambda: False  # pyright: ignore[reportPrivateUsage]
