"""Distributed training checkpoints: any number of processes can resume from them.

    state.json     schema version, the settings of the run, its progress
    tensors/       parameters and AdamW's moments, as Megatron-Core's distributed checkpoints: every process writes its
                   shards and reads those that it needs, whatever the number of writers

Written beside the previous one and exchanged atomically.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.optim import AdamW

from quiver_peft.files.atomic_folder import rename_into_place
from quiver_peft.files.json_files import read_json
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import get_shard
from quiver_trainer.errors import TrainingError
from quiver_trainer.reports.progress import Progress

_STATE_FILE = "state.json"
_TENSORS = "tensors"
_SCHEMA_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    mesh: Mesh,
    progress: Progress,
    settings: Mapping[str, Any],
) -> None:
    """Replace the checkpoint in the shared `folder`; called by all processes."""
    state = {"schema_version": _SCHEMA_VERSION, "settings": dict(settings), "progress": progress.to_json()}
    _write(folder, _shards(parameters, optimizer, mesh), mesh, state)


class DistributedBest:
    """`BestWeights` in a distributed checkpoint; all ranks call its methods."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self._folder, self._mesh = folder, mesh

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Save these as the best so far."""
        _write(self._folder, _shards(parameters, None, self._mesh), self._mesh, {})

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best into these."""
        _read(self._folder, _shards(parameters, None, self._mesh))


def _write(folder: Path, shards: Iterable[ShardedTensor], mesh: Mesh, state: Mapping[str, Any]) -> None:
    staging = folder.with_name(f".{folder.name}.new")
    if mesh.is_first:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / _TENSORS).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({shard.key: shard for shard in shards}, str(staging / _TENSORS))
    if mesh.is_first:
        (staging / _STATE_FILE).write_text(json.dumps(state))
        rename_into_place(staging, folder)
    dist.barrier()


def read_state(folder: Path) -> tuple[dict[str, Any], Progress] | None:
    """Settings and progress of the checkpoint in `folder`; None: there is none. Raises TrainingError."""
    if not folder.exists():
        return None
    try:
        state = read_json(folder / _STATE_FILE)
        if state["schema_version"] != _SCHEMA_VERSION:
            raise TrainingError(
                f"{folder / _STATE_FILE}: schema_version {state['schema_version']!r} is not known; this is "
                f"{_SCHEMA_VERSION}. Start over with --restart"
            )
        return state["settings"], Progress.from_json(state["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder}: not a whole checkpoint ({error}); start over with --restart") from None


def restore(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: AdamW, mesh: Mesh, num_steps: int) -> None:
    """Restore this process's shards of parameters and moments, as after `num_steps` steps.

    Raises TrainingError when something is missing or damaged.
    """
    if num_steps:
        for parameter in parameters.values():
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(
                float(num_steps), device=parameter.device if optimizer.defaults["fused"] else None
            )
            state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
    _read(folder, _shards(parameters, optimizer, mesh))


def _read(folder: Path, shards: Iterable[ShardedTensor]) -> None:
    wanted = {shard.key: shard for shard in shards}
    places = {key: shard.data for key, shard in wanted.items()}
    try:
        found: Any = dist_checkpointing.load(wanted, str(folder / _TENSORS), strict="raise_all")
    except (Exception, CheckpointException) as error:  # whatever Megatron and torch raise for files that are not whole
        why = str(error).rstrip().rpartition("\n")[2]
        raise TrainingError(f"{folder}: not a whole checkpoint ({why}); start over with --restart") from None
    with torch.no_grad():
        for key, place in places.items():
            assert place is not None
            place.copy_(found[key])


def _shards(parameters: Mapping[str, nn.Parameter], optimizer: AdamW | None, mesh: Mesh) -> Iterator[ShardedTensor]:
    """This process's shards, the parts of fused linears apart: another number of ranks splits each part."""
    for name, parameter in parameters.items():
        yield from _parts_of(f"parameter.{name}", parameter, parameter.detach(), mesh)
        for moment in _MOMENTS:
            if optimizer is not None and moment in optimizer.state[parameter]:
                yield from _parts_of(f"{moment}.{name}", parameter, optimizer.state[parameter][moment], mesh)


def _parts_of(key: str, parameter: nn.Parameter, tensor: Tensor, mesh: Mesh) -> Iterator[ShardedTensor]:
    shard = get_shard(parameter)
    if shard.dim is None:
        replica = mesh.data_rank * mesh.tensor_size + mesh.tensor_rank
        yield ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        return
    for i, (start, end) in enumerate(shard.local_parts(mesh)):
        yield ShardedTensor.from_rank_offsets(
            f"{key}.{i}" if len(shard.parts) > 1 else key,
            tensor.narrow(shard.dim, start, end - start),
            (shard.dim, mesh.tensor_rank, mesh.tensor_size),
            replica_id=mesh.data_rank,
            allow_shape_mismatch=shard.length is not None,  # a vocabulary's padding depends on the ranks
        )
