"""Keys of recipes that were renamed: the old spelling is still read, with a warning, until the release after 0.2."""

import warnings
from typing import Any, cast

from quiver_trainer.errors import ConfigError
from quiver_trainer.recipe.yaml_source import KeyPath, YamlSource

_NEW_NAMES = {"optimiser": "optimizer"}


def new_path(path: KeyPath) -> KeyPath:
    """The path of a key under its present name: at the top of a recipe, of a job, or, dotted, in a sweep."""
    depth = {"jobs": 2, "sweep": 1}.get(path[0], 0)
    if len(path) <= depth:
        return path
    name, dot, rest = path[depth].partition(".")
    return (*path[:depth], _NEW_NAMES.get(name, name) + dot + rest, *path[depth + 1 :])


def with_new_keys(source: YamlSource, name: str) -> YamlSource:
    """A recipe with the present names of its keys. Raises ConfigError where a key is given under both of its names."""
    lines: dict[KeyPath, int] = {}
    for path, line in source.lines.items():
        new = new_path(path)
        if new in lines:
            raise ConfigError(f"{name}:{line}: {'.'.join(new)} is given twice, first in line {lines[new]}")
        if new[-1] != path[-1]:
            message = f"{name}:{line}: {path[-1]} is called {new[-1]} since 0.2; the old name will not be read for long"
            warnings.warn(message, FutureWarning, stacklevel=2)
        lines[new] = line
    return YamlSource(_renamed(source.data, ()), lines)


def _renamed(value: Any, path: KeyPath) -> Any:
    if not isinstance(value, dict) or len(path) > 2:
        return value
    found: dict[Any, Any] = {}
    for key, item in cast(dict[Any, Any], value).items():
        below = (*path, str(key))
        new = new_path(below)[-1]
        found[key if new == str(key) else new] = _renamed(item, below)
    return found
