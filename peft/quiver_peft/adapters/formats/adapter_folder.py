"""The adapter on disk: a Hugging Face PEFT folder with a `quiver.json` beside it. Written atomically, read strictly.

    adapter_config.json        the methods' configuration: see formats.py
    adapter_model.safetensors  its tensors
    quiver.json                schema version, revision, base fingerprint, tokenizer digest, training record (optional)

The revision is the SHA-256 of the first two files: the same bytes are the same adapter, wherever they lie.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from quiver_peft.adapters.formats.adapter_files import (
    CONFIG_FILE,
    QUIVER_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    read_files,
    revision_of,
)
from quiver_peft.adapters.formats.adapterhub import from_adapterhub, is_adapterhub
from quiver_peft.adapters.formats.methods import read_methods, write_methods
from quiver_peft.adapters.formats.nemo.reader import read_nemo
from quiver_peft.adapters.formats.tensor_files import parse_safetensors, require_finite, unpickle_tensors
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError
from quiver_peft.files.atomic_folder import replace_folder
from quiver_peft.files.json_files import JsonError, parse_json

SCHEMA_VERSION = 1


def save_adapter(
    folder: str | Path,
    base: Base,
    adapter: TrainableAdapter,
    *,
    base_name: str = "",
    tokenizer_digest: str = "",
    training: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> str:
    """Write the artefact, replacing the whole folder in one step, and return its revision.

    extra_files: {name: content} to lie beside it, such as a learning curve; they do not belong to the revision.
    """
    config, tensors = write_methods(base, adapter.stored_weights(), base_name)
    config_bytes = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    weights_bytes = save_tensors(tensors, metadata={"format": "pt"})
    revision = revision_of(config_bytes, weights_bytes)
    record = {
        "schema_version": SCHEMA_VERSION,
        "revision": revision,
        "base_fingerprint": base.fingerprint,
        "tokenizer_digest": tokenizer_digest,
        "methods": [config.to_dict() for config in adapter.configs],
        "training": dict(training or {}),
    }
    files = {
        **(extra_files or {}),
        CONFIG_FILE: config_bytes,
        WEIGHTS_FILE: weights_bytes,
        QUIVER_FILE: (json.dumps(record, indent=2) + "\n").encode(),
    }
    replace_folder(Path(folder), files)
    return revision


def read_adapter(folder: str | Path, base: Base, tokenizer_digest: str = "") -> AdapterWeights:
    """Read and validate an adapter for `base`. Raises AdapterError; BaseMismatchError when it belongs to another.

    folder: ours, Hugging Face PEFT's, or AdapterHub's; of the latter also its pickle, and NeMo 1.x's `.nemo` archive,
    when it is the file itself that is named (they are read as tensors alone, never as code).
    """
    if Path(folder).suffix == ".nemo":
        return read_nemo(Path(folder), base)
    return parse_adapter(read_files(Path(folder)), base, tokenizer_digest)


def parse_adapter(files: AdapterFiles, base: Base, tokenizer_digest: str = "") -> AdapterWeights:
    """Validate files that were read. Raises AdapterError; BaseMismatchError when they belong to another base."""
    revision = files.revision
    record: dict[str, Any] = {}
    if files.manifest is not None:
        record_path = files.path_of(QUIVER_FILE)
        record = _parse_json(record_path, files.manifest)
        _check_record(record_path, record, revision, base, tokenizer_digest)
    config = _parse_json(files.path_of(CONFIG_FILE), files.config)
    tensors = _parse_tensors(files.path_of(files.weights_name), files.weights)
    try:
        if is_adapterhub(config):
            config, tensors = from_adapterhub(base, config, tensors)
        weights = read_methods(base, config, tensors)
        configs = _with_dropout_position(weights.configs, record)
    except AdapterError as error:
        raise type(error)(f"{files.folder}: {error}") from None
    return replace(
        weights,
        revision=revision,
        configs=configs,
        training=record.get("training", {}),
        base_fingerprint=str(record.get("base_fingerprint") or ""),
    )


def _with_dropout_position(configs: Sequence[PEFTConfig], record: Mapping[str, Any]) -> tuple[PEFTConfig, ...]:
    """Where LoRA's dropout was is the one thing that Hugging Face's form cannot say (theirs is on the input)."""
    positions = [item["dropout_position"] for item in record.get("methods", ()) if "dropout_position" in item]
    if not positions:
        return tuple(configs)
    return tuple(
        replace(config, dropout_position=positions[0]) if isinstance(config, LoraPEFTConfig) else config
        for config in configs
    )


def _parse_json(path: str, data: bytes) -> dict[str, Any]:
    try:
        return parse_json(data, path)
    except JsonError as error:
        raise AdapterError(str(error)) from None


def _parse_tensors(path: str, data: bytes) -> dict[str, Tensor]:
    tensors = (unpickle_tensors if path.endswith(".bin") else parse_safetensors)(path, data)
    require_finite(path, tensors)
    return tensors


def _check_record(path: str, record: Mapping[str, Any], revision: str, base: Base, tokenizer_digest: str) -> None:
    if record.get("schema_version") != SCHEMA_VERSION:
        raise AdapterError(
            f"{path}: schema_version {record.get('schema_version')!r} is not known; this is {SCHEMA_VERSION}"
        )
    if record.get("revision") != revision:
        raise AdapterError(
            f"{path}: the files beside it are not the ones it describes (revision {str(record.get('revision'))[:12]}, "
            f"found {revision[:12]}); save or copy the adapter again"
        )
    methods, training = record.get("methods"), record.get("training", {})
    if not isinstance(training, dict):
        raise AdapterError(f"{path}: training must be an object, not {training!r}")
    if not isinstance(methods, list) or not methods or not all(isinstance(item, dict) for item in methods):
        raise AdapterError(f"{path}: methods must be a list of objects, not {methods!r}")
    made_for = record.get("base_fingerprint")
    if made_for and base.fingerprint and made_for != base.fingerprint:
        raise BaseMismatchError(f"{path}: made for the base {str(made_for)[:12]}, this base is {base.fingerprint[:12]}")
    tokenizer = record.get("tokenizer_digest")
    if tokenizer and tokenizer_digest and tokenizer != tokenizer_digest:
        raise BaseMismatchError(f"{path}: made with another tokenizer than this base's")
