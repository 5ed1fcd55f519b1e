"""Recipes of several runs: `jobs` (overrides per run) and `sweep` (the product of lists of values).

base: models/demo-base
output: adapters                    # a folder for all of them, and for their comparison
data: {validation: data/all.jsonl}  # whatever they share
jobs:
  routing: {adapter: {method: lora}, data: {train: data/routing.jsonl}}
  extract: {adapter: {method: ia3}, data: {train: data/extract.jsonl}}
sweep:
  optimizer.learning_rate: [1e-3, 3e-3]
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from quiver_trainer.errors import ConfigError
from quiver_trainer.recipe.config import DEFAULT_BATCH_TOKENS, TrainConfig
from quiver_trainer.recipe.reader import RawRecipe, anchor_paths, read_raw
from quiver_trainer.recipe.yaml_source import YamlSource

_OWN_KEYS = ("jobs", "sweep", "pass_tokens")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")
# All runs share one base in memory.
_SHARED = ("base", "device", "dtype")


@dataclass(frozen=True)
class ManyRecipe:
    """Several runs. folder: of their comparison report. pass_tokens: tokens per forward pass, approximately."""

    configs: list[TrainConfig]
    folder: Path
    pass_tokens: int


def load_recipes(path: Path, overrides: Sequence[str] = ()) -> TrainConfig | ManyRecipe:
    """One run, or many where the file has `jobs` or `sweep`. Raises ConfigError, one line for each problem.

    Relative paths start where they are written: at the YAML file, or at the shell's folder.
    Overrides of `jobs`, `sweep`, `pass_tokens` and `output` change the file, others every run.
    """
    raw = read_raw(path)
    of_file = [override for override in overrides if re.split("[.=]", override)[0] in (*_OWN_KEYS, "output")]
    whole = raw.overridden(of_file)
    if not {"jobs", "sweep"} & set(whole.data):
        return raw.overridden(overrides).validated()
    folder = Path(_require(whole, "output", str, "a folder"))
    of_runs = [override for override in overrides if override not in of_file]
    configs = [run.overridden(of_runs).validated() for run in _runs(whole, folder)]
    for key in _SHARED:
        if len({getattr(config, key) for config in configs}) > 1:
            raise ConfigError(f"{path}: {key} must be the same for all jobs: they share one base in memory")
    return ManyRecipe(configs, folder, _pass_tokens(whole))


def _runs(whole: RawRecipe, folder: Path) -> Iterator[RawRecipe]:
    seen: set[str] = set()
    for name, job in _jobs(whole):
        for label, run in _swept(job, whole.data.get("sweep"), whole):
            run_name = "-".join(part for part in (name, label) if part)
            if run_name in seen:
                raise ConfigError(f"{whole.path}: sweep: two runs would both be called {run_name}")
            seen.add(run_name)
            run.data["output"] = str(folder / run_name)
            yield run


def _jobs(whole: RawRecipe) -> Iterator[tuple[str, RawRecipe]]:
    """Each job merged with the shared keys, by name; "" without `jobs`."""
    shared = {key: value for key, value in whole.data.items() if key not in _OWN_KEYS}
    if "jobs" not in whole.data:
        yield "", replace(whole, data=shared)
        return
    jobs = _require(whole, "jobs", dict, "{name: what is its own}")
    for name, own in jobs.items():
        if not isinstance(own, dict) or "output" in own:
            raise ConfigError(f"{whole.path}: jobs.{name}: must hold keys of a recipe, and no output: its name is that")
        own_data = cast(dict[str, Any], own)
        anchor_paths(own_data, whole.path.absolute().parent)
        here = {key[2:]: line for key, line in whole.source.lines.items() if key[:2] == ("jobs", str(name))}
        source = YamlSource(None, {**whole.source.lines, **here})
        yield str(name), replace(whole, data=_merge(shared, own_data), source=source)


def _swept(job: RawRecipe, sweep: Any, whole: RawRecipe) -> Iterator[tuple[str, RawRecipe]]:
    """A job for each combination of swept values, with its label."""
    if sweep is None:
        yield "", replace(job, data=copy.deepcopy(job.data))
        return
    if not isinstance(sweep, dict) or not all(isinstance(v, list) and v for v in cast(dict[str, Any], sweep).values()):
        raise ConfigError(f"{whole.path}: sweep must hold lists of values, such as `adapter.adapter_dim: [4, 16]`")
    keys = [str(key) for key in cast(dict[str, Any], sweep)]
    for values in itertools.product(*cast(dict[str, list[Any]], sweep).values()):
        assignments = [f"{key}={json.dumps(value)}" for key, value in zip(keys, values, strict=True)]
        label = "-".join(_label(key, value) for key, value in zip(keys, values, strict=True))
        yield label, job.overridden(assignments, whole.path.absolute().parent)


def _label(key: str, value: Any) -> str:
    """A short label, valid as a folder name."""
    if isinstance(value, dict):
        words = [str(v) for v in cast(dict[str, Any], value).values() if not isinstance(v, dict | list)]
    elif isinstance(value, list):
        words = [_label("", v) for v in cast(list[Any], value)]
    else:
        words = [key.rpartition(".")[2], str(value)]
    return _NOT_IN_NAMES.sub("-", "-".join(word for word in words if word)).strip("-")


def _merge(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; `adapter` is replaced as a whole."""
    merged = dict(shared)
    for key, value in own.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(value, dict) and key != "adapter"
        merged[key] = _merge(cast(dict[str, Any], before), cast(dict[str, Any], value)) if both else value
    return copy.deepcopy(merged)


def _require(whole: RawRecipe, key: str, kind: type[Any], what: str) -> Any:
    value = whole.data.get(key)
    if not isinstance(value, kind) or not value:
        raise ConfigError(f"{whole.path}: {key} must be {what}, not {value!r}")
    return value


def _pass_tokens(whole: RawRecipe) -> int:
    value = whole.data.get("pass_tokens", DEFAULT_BATCH_TOKENS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{whole.path}: pass_tokens must be a whole number above zero, not {value!r}")
    return value
