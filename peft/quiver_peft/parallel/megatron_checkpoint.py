"""Distributed checkpoints of Megatron-Core's GPTModel and T5Model, read into a base and written from one.

One process does it, whatever cut the checkpoint has or will be read with. What else is in it (an optimizer, the FP8
states of Transformer Engine's layers) is passed over, and not written: who loads what was written asks for no
`_extra_state`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from quiver_peft.base.base import Base
from quiver_peft.base.config import T5Config
from quiver_peft.errors import CheckpointError
from quiver_peft.parallel.megatron_names import Entry, entries, from_megatron, to_megatron

_HEAD_BIAS = "lm_head.output_layer.bias"


def write_megatron(base: Base, folder: Path) -> None:
    """Write a whole base, to be loaded by `dist_checkpointing.load(model.sharded_state_dict(), folder)`.

    Raises CheckpointError where something is there. A mesh of one process must have been started.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty; a checkpoint is written into a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        entry: to_megatron(base.get_parameter(entry.ours).detach(), entry.layout, base.config).contiguous()
        for entry in entries(base)
    }
    sharded = {_name(entry): _sharded(entry, tensor) for entry, tensor in tensors.items()}
    # A T5Model asks for both names of what its head has.
    biases = {**_head_bias(base, _HEAD_BIAS), **_head_bias(base, _HEAD_BIAS.removeprefix("lm_head."))}
    dist_checkpointing.save({**sharded, **biases}, str(folder))


def read_megatron(base: Base, folder: Path) -> None:
    """Fill a base of the same architecture. Raises CheckpointError for what is missing or has another shape.

    A mesh of one process must have been started.
    """
    wanted = {entry: base.get_parameter(entry.ours) for entry in _on_first_rank(entries(base))}
    asked = {_name(entry): _sharded(entry, torch.empty_like(place.data)) for entry, place in wanted.items()}
    try:
        found = dist_checkpointing.load(
            {**asked, **_head_bias(base, _HEAD_BIAS)}, str(folder), strict="raise_unexpected"
        )
    except (Exception, CheckpointException) as error:  # whatever Megatron and torch raise
        why = str(error).rstrip().rpartition("\n")[2]
        raise CheckpointError(f"{folder}: not a checkpoint of this architecture: {why}") from None
    assert isinstance(found, dict)
    if _HEAD_BIAS in found and found[_HEAD_BIAS].any():
        raise CheckpointError(f"{folder}: {_HEAD_BIAS} is not zero, and a base's head has no bias")
    for entry, place in wanted.items():
        place.data.copy_(from_megatron(found[_name(entry)], entry.layout, base.config))


def _head_bias(base: Base, key: str) -> dict[str, ShardedTensor]:
    """What a T5Model whose head is tied has beside it: zeros."""
    if base.head is not None or not isinstance(base.config, T5Config):
        return {}
    bias = torch.zeros(base.config.vocab_size)
    return {key: ShardedTensor.from_rank_offsets(key, bias, allow_shape_mismatch=True)}


def _on_first_rank(found: Iterator[Entry]) -> Iterator[Entry]:
    """One entry for each parameter: the first."""
    return iter({entry.ours: entry for entry in reversed(list(found))}.values())


def _name(entry: Entry) -> str:
    return entry.key if entry.layer is None else f"{entry.key} of layer {entry.layer}"


def _sharded(entry: Entry, tensor: Tensor) -> ShardedTensor:
    if entry.layer is None:
        return ShardedTensor.from_rank_offsets(entry.key, tensor, allow_shape_mismatch=entry.pads)
    offsets = (0, entry.layer, entry.num_layers)
    return ShardedTensor.from_rank_offsets(entry.key, tensor, offsets, prepend_axis_num=1)
