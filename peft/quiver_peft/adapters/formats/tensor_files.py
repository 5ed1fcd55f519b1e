"""Tensors out of bytes: safetensors, and torch's pickles read as tensors alone, never as code."""

import io
import math
import warnings
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from quiver_peft.errors import AdapterError


def parse_safetensors(name: object, data: bytes) -> dict[str, Tensor]:
    """{name: tensor}. name: what errors call the file. Raises AdapterError."""
    try:
        return load_tensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{name}: not a whole safetensors file: {error}") from None


def unpickle_tensors(name: object, data: bytes) -> dict[str, Tensor]:
    """{name: tensor} of a pickle that holds nothing else. Raises AdapterError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a pickle's protocol
            found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AdapterError(f"{name}: not a pickle of tensors alone: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise AdapterError(f"{name}: must hold tensors by name")
    return found  # pyright: ignore[reportUnknownVariableType]


def require_finite(name: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterError for a tensor that is not floating point, or holds a value that is not finite."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{name}: tensor {key!r} has type {tensor.dtype}; adapter weights are floating point")
        if not _is_finite(tensor):
            raise AdapterError(f"{name}: tensor {key!r} holds a value that is not finite")


def _is_finite(tensor: Tensor) -> bool:
    """In one pass: a NaN would be both extremes."""
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.float()))
