"""Fingerprint of a run: the settings that determine its result, to match checkpoints and results to recipes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quiver_trainer.data.dataset import file_sha256
from quiver_trainer.recipe.config import TrainConfig

# These change where or how often something is written, or where it is computed, but not what is learnt.
_IRRELEVANT = ("output", "device", "checkpoint_interval_steps", "tensorboard", "parallel")


def run_settings(config: TrainConfig, base_fingerprint: str, methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{dotted key: JSON value}. Files count by their content, the base by its fingerprint: folders may move.

    methods: the adapter's configurations; empty for full fine-tuning. Raises DataError.
    """
    flat = _flatten(config.model_dump(mode="json", exclude={"adapter", *_IRRELEVANT}))
    flat["base"] = base_fingerprint
    files = [[file_sha256(file.path), file.weight] for file in config.data.train_files]
    flat["data.train"] = files[0][0] if isinstance(config.data.train, Path) else files
    flat["data.validation"] = None if config.data.validation is None else file_sha256(config.data.validation)
    for i, method in enumerate(methods):
        flat.update({f"adapter.{i}.{key}": value for key, value in method.items()})
    # As they come back from a file: lists, not tuples.
    return json.loads(json.dumps(flat))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Up to three differing keys with their values, as text; "" if none differs."""
    keys = [key for key in {**then, **now} if then.get(key, "unset") != now.get(key, "unset")]
    told = [
        f"{key} was {_brief(then.get(key, 'unset'))} and is now {_brief(now.get(key, 'unset'))}" for key in keys[:3]
    ]
    more = [f"{len(keys) - 3} more"] if len(keys) > 3 else []
    return "; ".join(told + more)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[prefix + key] = value
    return flat


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
