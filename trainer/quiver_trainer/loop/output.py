"""Writes the output folder: the adapter, or the Hugging Face folder of a fully fine-tuned base."""

import json
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quiver_peft.base.checkpoint import save_checkpoint
from quiver_peft.base.families import FAMILIES
from quiver_peft.files.atomic_folder import replace_folder
from quiver_peft.files.json_files import parse_json
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.dataset import Dataset
from quiver_trainer.loop.run import Run
from quiver_trainer.loop.run_directory import METRICS_FILE, RECORD_FILE
from quiver_trainer.reports.learning_curve import draw_learning_curve
from quiver_trainer.reports.model_card import CARD_FILE, model_card
from quiver_trainer.reports.progress import Progress, to_jsonl

CURVE_FILE = "learning_curve.png"

# Of a base folder, what belongs to the model beside its weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_NOT_COMPANIONS = ("model.safetensors.index.json", RECORD_FILE)


def write_result(run: Run, tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """Replace the output folder of a finished run; returns the adapter's revision ("" for a base) and its record."""
    config, model, progress = run.config, run.model, run.progress
    num_parameters = sum(parameter.numel() for parameter in run.parameters.values())
    record = training_record(progress, run.settings, run.datasets, num_parameters)
    methods = [] if model.adapter is None else [method.to_dict() for method in model.adapter.configs]
    what = "whole base" if model.adapter is None else "adapter"
    matched = len(run.validator.match_samples) if run.validator else 0
    files = {
        CURVE_FILE: draw_learning_curve(progress, f"{run.name}: {what} trained on {config.base.name}", matched),
        CARD_FILE: model_card(run.name, config.base.name, record, methods, CURVE_FILE).encode(),
        METRICS_FILE: to_jsonl([*progress.train_records, *progress.validation_records]).encode(),
    }
    if model.adapter is None:
        write_base(model, config.base, config.output, record, files)
        return "", record
    revision = model.save_adapter(
        config.output,
        base_name=config.base.name,
        tokenizer_digest=tokenizer.digest,
        training=record,
        extra_files=files,
    )
    return revision, record


def training_record(
    progress: Progress, settings: Mapping[str, Any], datasets: Mapping[str, Dataset], num_parameters: int
) -> dict[str, Any]:
    """The training record for quiver.json: JSON-ready, without paths."""
    first = progress.validation_records[0] if progress.validation_records else None
    last = progress.validation_records[-1] if progress.validation_records else None
    if settings["evaluation.keep"] == "best":
        last = progress.kept_validation
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "train_loss": progress.train_records[-1].train_loss,
        "validation_loss": last.validation_loss if last else None,
        "validation_loss_at_start": first.validation_loss if first else None,
        "exact_match": last.exact_match if last else None,
        "token_accuracy": last.token_accuracy if last else None,
        "rouge_l": last.rouge_l if last else None,
        "bleu": last.bleu if last else None,
        "kept_step": last.step if last else progress.step,
        "stopped_early": progress.stopped_early,
        "exact_match_at_start": first.exact_match if first else None,
        "num_trainable_parameters": num_parameters,
        "data": {name: _model_card_fields(data) for name, data in datasets.items()},
        "settings": dict(settings),
        "versions": {
            "quiver": version("quiver"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    }


def _model_card_fields(data: Dataset) -> dict[str, Any] | list[dict[str, Any]]:
    """The file of a dataset, or several with their weights."""
    files = [
        {
            "file": file.path.name,
            "rows": len(file.samples),
            "rows_skipped": file.num_skipped,
            "sha256": file.sha256,
            "weight": file.weight,
        }
        for file in data.files
    ]
    return files if len(files) > 1 else files[0]


def write_base(
    model: AnyModel, base_folder: Path, output: Path, record: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Replace `output` by the fine-tuned base in float32, with the configuration and tokenizer of the base folder."""
    companions = {
        path.name: path.read_bytes()
        for pattern in _COMPANIONS
        for path in base_folder.glob(pattern)
        if path.is_file() and path.name not in _NOT_COMPANIONS
    }
    config = parse_json(companions["config.json"], str(base_folder / "config.json"))
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)  # the older name of the same
    companions["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    companions[RECORD_FILE] = (json.dumps({"schema_version": 1, "training": dict(record)}, indent=2) + "\n").encode()
    renames = FAMILIES[model.base.config.family].tensor_mappings(model.base.config)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as staging:
        save_checkpoint(model.base, Path(staging), renames, torch.float32)
        weights = {path.name: path.read_bytes() for path in Path(staging).iterdir()}
    replace_folder(output, {**files, **companions, **weights})
