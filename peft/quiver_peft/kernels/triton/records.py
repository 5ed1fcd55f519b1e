"""Descriptors of one adapter at one site for the Triton kernels: int64 records of shapes and adapter-memory offsets.

Offsets are in elements from the memory's start; -1 means none. A record of zeros is the base: no rank, no scale.
"""

import struct

import torch
from torch import Tensor

from quiver_peft.errors import AdapterError
from quiver_peft.kernels.grouped_bottleneck import BottleneckAtSite
from quiver_peft.kernels.grouped_lora import LoraAtSite
from quiver_peft.kernels.grouped_scale import ScaleAtSite

MAX_EXPANDS = 4
MAX_SCALES = 8
# rank of all targets, A, number of targets; for each: first and last rank, first and last output, scaled Bᵀ
LORA_HEAD, LORA_EXPAND = 3, 5
LORA_FIELDS = LORA_HEAD + LORA_EXPAND * MAX_EXPANDS
# whether the input is scaled, by what, number of output scales; for each: first and last output, scale, shift
SCALE_HEAD, SCALE_OUT = 3, 4
SCALE_FIELDS = SCALE_HEAD + SCALE_OUT * MAX_SCALES
# rank, down, up, their biases, norm weight and bias, norm position, activation, source, scale as bits of a
# float, the bias to leave out of the source
BOTTLENECK_FIELDS = 12

NORMS = (None, "pre", "post")
ACTIVATIONS = ("swish", "relu", "gelu", "gelu_tanh")
SOURCES = ("output", "output_before_bias", "sum", "residual")


def lora_record(lora: LoraAtSite) -> list[int]:
    """Raises AdapterError when the site has more targets than a record holds."""
    _check_room(len(lora.expands), MAX_EXPANDS, "LoRA targets")
    fields = [lora.a.shape[0], _offset(lora.a), len(lora.expands)]
    for expand in lora.expands:
        fields += [*expand.ranks, expand.start, expand.end, _offset(expand.b_t)]
    return fields


def scale_record(scale: ScaleAtSite) -> list[int]:
    """Raises AdapterError when the site has more scales than a record holds."""
    _check_room(len(scale.out), MAX_SCALES, "scales")
    fields = [int(scale.in_scale is not None), _offset(scale.in_scale), len(scale.out)]
    for out in scale.out:
        fields += [out.start, out.end, _offset(out.scale), _offset(out.shift)]
    return fields


def bottleneck_record(bottleneck: BottleneckAtSite) -> list[int]:
    """The descriptor of a bottleneck."""
    tensors = (
        bottleneck.down,
        bottleneck.up,
        bottleneck.down_bias,
        bottleneck.up_bias,
        bottleneck.norm_weight,
        bottleneck.norm_bias,
    )
    return [
        bottleneck.down.shape[0],
        *map(_offset, tensors),
        NORMS.index(bottleneck.norm_position),
        ACTIVATIONS.index(bottleneck.activation),
        SOURCES.index(bottleneck.source),
        struct.unpack("i", struct.pack("f", bottleneck.scale))[0],
        _offset(bottleneck.out_bias),
    ]


def record_table(records: list[list[int]], num_fields: int) -> Tensor:
    """A table of records [n, num_fields] int64 on the CPU, zero-padded."""
    table = torch.zeros(len(records), num_fields, dtype=torch.int64)
    for row, fields in enumerate(records):
        table[row, : len(fields)] = torch.tensor(fields, dtype=torch.int64)
    return table


def _offset(tensor: Tensor | None) -> int:
    return -1 if tensor is None else int(tensor.storage_offset())


def _check_room(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise AdapterError(f"{count} {what} at one site; the kernels on this device take at most {limit}")
