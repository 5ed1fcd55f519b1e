"""Reads a recipe (YAML plus key=value overrides) into a TrainConfig; errors name file and line, or the override."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from quiver_trainer.errors import ConfigError
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.recipe.methods import METHOD_SECTIONS
from quiver_trainer.recipe.old_keys import new_path, with_new_keys
from quiver_trainer.recipe.yaml_source import KeyPath, YamlSource, parse_yaml

_PATH_KEYS: tuple[KeyPath, ...] = (("base",), ("output",), ("data", "train"), ("data", "validation"), ("tensorboard",))


@dataclass(frozen=True)
class RawRecipe:
    """A recipe before validation. origins: {path of a key: the override or sweep that set it}."""

    data: dict[str, Any]
    source: YamlSource
    path: Path
    origins: Mapping[KeyPath, str] = field(default_factory=dict[KeyPath, str])

    def overridden(self, overrides: Sequence[str], folder: Path | None = None) -> "RawRecipe":
        """A copy with key=value applied. Raises ConfigError.

        folder: root of relative paths in them; None: the current folder.
        """
        data = copy.deepcopy(self.data)
        origins = dict(_apply_override(data, override, folder or Path.cwd()) for override in overrides)
        return replace(self, data=data, origins={**self.origins, **origins})

    def validated(self) -> TrainConfig:
        """Raises ConfigError, one line for each problem."""
        if "adapter" not in self.data:
            raise ConfigError(f"{self.path}: adapter is required; write `adapter: null` to fine-tune the whole base")
        one_method = isinstance(self.data["adapter"], dict)
        listed = {**self.data, "adapter": [self.data["adapter"]]} if one_method else self.data
        try:
            # JSON is what pydantic can read strictly: no text for a number, but lists for tuples and text for paths.
            return TrainConfig.model_validate_json(json.dumps(listed, default=str), strict=True)
        except ValidationError as error:
            messages = [_describe(details, self) for details in error.errors()]
            raise ConfigError("\n".join(dict.fromkeys(messages))) from None


def read_raw(path: Path) -> RawRecipe:
    """A YAML file's content with its paths made absolute. Raises ConfigError."""
    source = parse_yaml(_read_text(path), str(path))
    if not isinstance(source.data, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as `base: models/demo-base`")
    source = with_new_keys(source, str(path))
    data = cast(dict[str, Any], source.data)
    anchor_paths(data, path.absolute().parent)
    return RawRecipe(data, source, path)


def anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Makes the paths of a recipe absolute, in place."""
    for key in _PATH_KEYS:
        _anchor(data, key, folder)
    section = data.get("data")
    files = cast(dict[str, Any], section).get("train") if isinstance(section, dict) else None
    for file in cast(list[Any], files) if isinstance(files, list) else []:
        if isinstance(file, dict):
            _anchor(cast(dict[str, Any], file), ("path",), folder)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _anchor(data: dict[str, Any], key: KeyPath, folder: Path) -> None:
    """Make one path absolute, in place; validation rejects non-strings later."""
    section: Any = data
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(section.get(key[-1]), str) and section[key[-1]]:
        section[key[-1]] = str(folder / Path(section[key[-1]]).expanduser())


def _apply_override(data: dict[str, Any], override: str, folder: Path) -> tuple[KeyPath, str]:
    """Sets one key, in place, and returns its path and the override as written."""
    key, equals, text = override.partition("=")
    parts = new_path(tuple(key.split(".")))
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: an override is key=value, such as optimizer.learning_rate=1e-4")
    value = parse_yaml(text, f"{override!r}").data
    target: Any = data
    for depth, part in enumerate(parts[:-1], start=1):
        target = _child(target, part)
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"{override!r}: {'.'.join(parts[:depth])} holds no keys")
    if isinstance(target, list):
        items = cast(list[Any], target)
        items[_index(items, parts[-1], override)] = value
    else:
        target[parts[-1]] = value
    if parts in _PATH_KEYS:
        _anchor(data, parts, folder)
    return parts, override


def _child(target: Any, part: str) -> Any:
    """One level down; a section that is not there yet, or null, begins empty."""
    if isinstance(target, list):
        items = cast(list[Any], target)
        return items[int(part)] if part.isdecimal() and int(part) < len(items) else None
    section = cast(dict[str, Any], target)
    if section.get(part) is None:
        section[part] = {}
    return section[part]


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"{override!r}: {part} is not a place in a list of {len(items)}")
    return int(part)


def _describe(details: ErrorDetails, raw: RawRecipe) -> str:
    """One line: where the value was written, the key, the rule, the value."""
    missing = details["type"] in ("missing", "union_tag_not_found")
    location, value, rule = details["loc"], details["input"], details["msg"]
    if details["type"].startswith("union_tag_"):  # a method that is not there, or not known
        location = (*location, "method")
        value = details.get("ctx", {}).get("tag")
        rule = f"should be one of {', '.join(METHOD_SECTIONS)}"
    key = _key_path(location, raw.data, missing)
    lines = raw.source.lines
    origin = next((text for parts, text in raw.origins.items() if parts == key[: len(parts)]), None)
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = f"{origin!r}" if origin else f"{raw.path}:{line}" if line else str(raw.path)
    name = ".".join(key)
    if missing:
        return f"{where}: {name} is required"
    if details["type"] == "extra_forbidden":
        return f"{where}: {name} is not a known key; `quiver train --help` lists them"
    rule = rule.removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return f"{where}: {rule}"
    return f"{where}: {name}: {rule}, not {_shorten(value)}"


def _key_path(location: tuple[int | str, ...], data: Any, missing: bool) -> KeyPath:
    """Pydantic's location as a path of recipe keys: without type names and the index of a single method."""
    key: list[str] = []
    for depth, part in enumerate(location):
        if isinstance(data, dict) and (isinstance(part, int) or part == data.get("method")):
            continue
        last_is_missing = missing and depth == len(location) - 1
        if isinstance(data, dict) and (part in data or last_is_missing):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            break
        key.append(str(part))
    return tuple(key)


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
