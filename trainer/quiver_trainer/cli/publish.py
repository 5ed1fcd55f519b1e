"""`quiver publish`: puts an adapter into a store after it loaded and reproduced its recorded metrics."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quiver_peft import T5
from quiver_peft.adapters.store.store import AdapterStore, publish
from quiver_peft.chat_template import read_chat_template
from quiver_peft.device import choose_device
from quiver_peft.errors import AdapterError
from quiver_peft.files.json_files import read_json
from quiver_peft.model import AnyModel, load_model
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.command import command_parser, run_command
from quiver_trainer.data.batching import BatchLimits
from quiver_trainer.data.dataset import file_sha256, read_dataset
from quiver_trainer.data.jsonl import Encoder
from quiver_trainer.data.span_corruption import SpanCorruptor
from quiver_trainer.errors import DataError
from quiver_trainer.loop.run_directory import RECORD_FILE
from quiver_trainer.loop.validation import Validator
from quiver_trainer.recipe.config import EvaluationSection
from quiver_trainer.reports.progress import Progress, ValidationRecord

_DESCRIPTION = """\
Put an adapter into a store, in one step: a server that serves the store offers it at once, and never half of it.

  quiver publish --base models/demo-base --validation data/routing/validation.jsonl adapters/routing /srv/adapters
  quiver publish --base models/demo-base --unmeasured adapters/from-elsewhere s3://bucket/adapters --id routing

Before that the adapter is loaded on its base, and measured on the rows that it was validated on: its loss and exact
matches must be those that it was recorded with. Nothing is written otherwise.
"""
# Of a loss, computed by other kernels or on another device.
_TOLERANCE = 2e-3


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_command(_parser(), argv, _run)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("quiver publish", _DESCRIPTION)
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the base")
    parser.add_argument("--validation", type=Path, metavar="FILE", help="the rows that it was validated on")
    parser.add_argument("--unmeasured", action="store_true", help="only load it; needed where it has no record")
    parser.add_argument("--id", help="under which id; its folder's name unless given")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there), cpu, cuda, cuda:1")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="adapter folder")
    parser.add_argument("store", metavar="STORE", help="folder of adapters, or a URL such as s3://bucket/adapters")
    return parser


def _id(options: argparse.Namespace) -> str:
    return options.id or options.adapter.resolve().name


def _run(options: argparse.Namespace) -> None:
    store = AdapterStore(options.store)  # before the base is loaded: a URL that is none is told at once
    record = _training_record(options.adapter)
    dtype = record.get("settings", {}).get("dtype", "float32")
    model = load_model(options.base, dtype=getattr(torch, dtype), device=choose_device(options.device))
    model.load_adapters(options.adapter)
    model.freeze()
    if not options.unmeasured:
        _require_record(options, record)
        _compare(record, _measure(options, model, record["settings"]))
    revision = publish(options.adapter, store, _id(options))
    print(f"published {_id(options)} as revision {revision[:12]} in {options.store}")


def _training_record(adapter: Path) -> Mapping[str, Any]:
    """The training record of the folder's quiver.json; empty without one. Loading checks the rest."""
    try:
        return read_json(adapter / RECORD_FILE)["training"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _require_record(options: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Raises DataError if the record holds no metrics, or those of other rows."""
    if record.get("validation_loss") is None:
        raise DataError(
            f"{options.adapter}: records no validation loss to compare with; --unmeasured publishes it once it loads"
        )
    if options.validation is None:
        raise DataError("--validation FILE is needed, the rows it was validated on; or --unmeasured")
    recorded, given = record["data"]["validation"]["sha256"], file_sha256(options.validation)
    if recorded != given:
        raise DataError(
            f"{options.validation}: is not the file that {options.adapter} was validated on "
            f"(SHA-256 {given[:12]}, recorded {recorded[:12]})"
        )


def _measure(options: argparse.Namespace, model: AnyModel, settings: Mapping[str, Any]) -> ValidationRecord:
    tokenizer, template = Tokenizer(options.base), read_chat_template(options.base)
    evaluation = {
        key.removeprefix("evaluation."): value for key, value in settings.items() if key.startswith("evaluation.")
    }
    config, eos = model.base.config, model.base.config.eos_token_ids[0]
    encoder = Encoder(
        tokenizer,
        eos,
        config.vocab_size,
        settings["data.max_length"] or model.max_tokens,
        corrupt_spans=isinstance(model, T5),
        chat_template=template,
    )
    data = read_dataset(options.validation, encoder, skip_too_long=settings["data.too_long"] == "skip")
    mender = SpanCorruptor(tokenizer, eos, settings["seed"]) if data.has_raw_text else None
    limits = BatchLimits(settings["batch_tokens"], settings["batch_size"])
    measuring = Validator(EvaluationSection(**evaluation), data, mender, limits, num_steps=1)
    return measuring.measure(model, tokenizer, Progress())


def _compare(record: Mapping[str, Any], measured: ValidationRecord) -> None:
    """Raises AdapterError if the measured metrics are worse than the recorded ones."""
    for name, recorded, now in (
        ("validation loss", record["validation_loss"], measured.validation_loss),
        ("exact match", record["exact_match"], measured.exact_match),
    ):
        if recorded is None or now is None:
            continue
        # One answer of many may turn with the last bit of a logit.
        tolerance = _TOLERANCE * max(1.0, recorded) if name == "validation loss" else 0.021
        if abs(recorded - now) > tolerance:
            raise AdapterError(
                f"{name} is {now:.4f}, recorded {recorded:.4f}: not the adapter that was measured, or another base; "
                "nothing was published"
            )
