"""Reads and writes Hugging Face checkpoints: streams tensors through a table of names; none may lack or be left.

Peak memory of reading: the model and one tensor (safetensors files are memory-mapped).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quiver_peft.base.families import FAMILIES
from quiver_peft.base.family import TensorMapping
from quiver_peft.base.sites import Linear
from quiver_peft.errors import CheckpointError
from quiver_peft.files import json_files
from quiver_peft.files.json_files import JsonError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD = "lm_head.weight"
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them

ShardSlice = Callable[[TensorMapping, Tensor], Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        return json_files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a base is a Hugging Face folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    except JsonError as error:
        raise CheckpointError(str(error)) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the stop tokens of generation_config.json, which is where newer models keep them all."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not supported; "
            f"known: {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config is not supported; use plain weights")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos
    return config


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or single. Raises CheckpointError."""
    if (folder / _INDEX).is_file():
        names = _shard_names(folder / _INDEX)
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder / _INDEX}: names the shard {name!r}, which is not in the folder")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise CheckpointError(f"{folder}: no {_SINGLE} and no {_INDEX}; pickled checkpoints (.bin) are not read")


def _shard_names(index: Path) -> list[str]:
    weight_map: object = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must hold the name of a shard for each tensor")
    return sorted({str(name) for name in weight_map.values()})


def stream_tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of some safetensors files, one in memory at a time."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def tensor_names(paths: Iterable[Path]) -> Iterator[str]:
    """The names of every tensor of some safetensors files, without reading the tensors."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                yield from file.keys()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def narrow_parameters(folder: Path, mappings: Iterable[TensorMapping]) -> dict[str, torch.dtype]:
    """The parameters whose every tensor in a checkpoint is of one 16-bit type, and that type. Reads headers alone."""
    prefix = FAMILIES[read_config(folder)["model_type"]].prefix
    ours = {mapping.theirs: mapping.ours for mapping in mappings}
    found: dict[str, set[torch.dtype | None]] = {}
    for path in shard_paths(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                parameter = ours.get(name) or ours.get(prefix + name)
                if parameter is not None:
                    found.setdefault(parameter, set()).add(_NARROW.get(file.get_slice(name).get_dtype()))
    single = {parameter: next(iter(types)) for parameter, types in found.items() if len(types) == 1}
    return {parameter: dtype for parameter, dtype in single.items() if dtype is not None}


def _target(model: nn.Module, rename: TensorMapping) -> Tensor:
    """The rows of the parameter that a checkpoint tensor fills, as a view."""
    module_name, _, parameter_name = rename.ours.rpartition(".")
    module = model.get_submodule(module_name)
    parameter: Tensor = getattr(module, parameter_name).data
    if not rename.part:
        return parameter
    assert isinstance(module, Linear)
    start, end = module.part_rows(rename.part)
    return parameter[start:end]


def load_checkpoint(
    model: nn.Module, folder: Path, renames: list[TensorMapping], cut: ShardSlice | None = None
) -> None:
    """Fill every parameter of `model` in place. Raises CheckpointError for a tensor missing, left over or misshapen.

    cut: takes this rank's shard of a tensor that is laid out as ours, for a tensor-parallel model; None: the whole.
    """
    family = FAMILIES[read_config(folder)["model_type"]]
    table = {rename.theirs: rename for rename in renames}
    second_head: Tensor | None = None
    for name, tensor in stream_tensors(shard_paths(folder)):
        full_name = name if name in table else family.prefix + name
        if full_name not in table:
            if name == _HEAD:
                second_head = tensor
                continue
            if name.endswith(family.ignored):
                continue
            raise CheckpointError(f"{folder}: tensor {name!r} has no place in this architecture")
        rename = table.pop(full_name)
        target = _target(model, rename)
        tensor = tensor.T if rename.transposed else tensor
        tensor = tensor if cut is None else cut(rename, tensor)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {list(tensor.shape)}, config.json says {list(target.shape)}"
            )
        target.copy_(tensor)
    if second_head is not None:
        tied = TensorMapping(_HEAD, "embedding.weight")
        _check_second_head(model, second_head if cut is None else cut(tied, second_head), folder)
    if table:
        raise CheckpointError(f"{folder}: {len(table)} tensors are missing, the first is {next(iter(table))!r}")


def _check_second_head(model: nn.Module, head: Tensor, folder: Path) -> None:
    """Checks that a tied head that the checkpoint also stores equals the embedding."""
    embedding: Tensor = model.get_parameter("embedding.weight")
    if not torch.equal(head.to(embedding), embedding.data):
        raise CheckpointError(
            f"{folder}: {_HEAD} differs from the embedding, but config.json says tie_word_embeddings; set it to false"
        )


def has_head(folder: Path) -> bool:
    """Whether the checkpoint stores a head of its own."""
    return any(name == _HEAD for name in tensor_names(shard_paths(folder)))


def save_checkpoint(model: nn.Module, folder: Path, renames: list[TensorMapping], dtype: torch.dtype) -> None:
    """Write the model's weights as `model.safetensors` under the family's own names. config.json is the caller's."""
    tensors = {}
    for rename in renames:
        tensor = _target(model, rename)
        tensors[rename.theirs] = (tensor.T if rename.transposed else tensor).to("cpu", dtype).contiguous().clone()
    save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})


def fingerprint(folder: Path) -> str:
    """Identifies a base: SHA-256 over every tensor's name, shape, type and first and last 16 KiB.

    Sampled, so that it costs milliseconds per gigabyte; two trainings of the same architecture differ everywhere.
    It does not depend on how the checkpoint is sharded, nor on the type it is served in.
    """
    digests: list[bytes] = []
    for name, tensor in stream_tensors(shard_paths(folder)):
        flat = tensor.reshape(-1)
        count = 16384 // tensor.element_size()
        digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        for piece in (flat[:count], flat[-count:]):
            digest.update(piece.contiguous().view(torch.uint8).numpy().tobytes())
        digests.append(name.encode() + b"\0" + digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
