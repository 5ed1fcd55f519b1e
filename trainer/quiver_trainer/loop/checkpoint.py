"""Training checkpoints: the state from which an interrupted run resumes bit for bit, written atomically.

state.json          schema version, the settings of the run, its progress
state.safetensors   parameters, AdamW's moments, states of the random generators
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import AdamW

from quiver_peft.files.atomic_folder import replace_folder
from quiver_peft.files.json_files import read_json
from quiver_trainer.errors import TrainingError
from quiver_trainer.loop.rng import RunRng
from quiver_trainer.reports.progress import Progress

_STATE_FILE = "state.json"
_TENSORS_FILE = "state.safetensors"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read. settings: of the run that wrote it."""

    settings: Mapping[str, Any]
    progress: Progress
    tensors: Mapping[str, Tensor]


def write_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    stream: RunRng,
    progress: Progress,
    settings: Mapping[str, Any],
) -> None:
    """Replace the checkpoint in `folder` atomically."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    moments: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    for index, state in moments.items():
        tensors.update({f"optimizer.{index}.{key}": tensor for key, tensor in state.items()})
    tensors.update({f"random.{device}": state for device, state in stream.states.items()})
    state = {"schema_version": _SCHEMA_VERSION, "settings": dict(settings), "progress": progress.to_json()}
    content = save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    replace_folder(folder, {_STATE_FILE: json.dumps(state).encode(), _TENSORS_FILE: content})


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None where there is none. Raises TrainingError when it is damaged."""
    if not folder.exists():
        return None
    try:
        state = read_json(folder / _STATE_FILE)
        if state["schema_version"] != _SCHEMA_VERSION:
            raise TrainingError(
                f"{folder / _STATE_FILE}: schema_version {state['schema_version']!r} is not known; this is "
                f"{_SCHEMA_VERSION}. Start over with --restart"
            )
        tensors = load_tensors((folder / _TENSORS_FILE).read_bytes())
        return Checkpoint(state["settings"], Progress.from_json(state["progress"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(f"{folder}: not a whole checkpoint ({error}); start over with --restart") from None


def restore(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: AdamW, stream: RunRng) -> None:
    """Restore parameters, optimizer moments and RNG states. The caller has compared the settings."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "parameter":
            parameters[rest].data.copy_(tensor)
        elif kind == "optimizer":
            index, _, key = rest.partition(".")
            states.setdefault(int(index), {})[key] = tensor
        elif kind == "random":
            stream.states[rest] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
