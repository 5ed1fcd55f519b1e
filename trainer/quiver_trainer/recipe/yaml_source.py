"""YAML read with the line of every key, duplicate keys refused, and numbers as people write them (2e-4)."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from quiver_trainer.errors import ConfigError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class YamlSource:
    """data: what the text holds. lines: {path of a key: its line, from 1}; positions in a list are "0", "1", ..."""

    data: Any
    lines: dict[KeyPath, int]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: PyYAML alone reads 2e-4 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, name: str) -> YamlSource:
    """Reads one document. Raises ConfigError that begins with `name` and the line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlSource(None, {})
        lines: dict[KeyPath, int] = {}
        _collect_lines(node, (), lines, name)
        return YamlSource(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _collect_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, str(key.value))
            line: int = key.start_mark.line + 1
            if child in lines:
                raise ConfigError(f"{name}:{line}: {'.'.join(child)} is given twice, first in line {lines[child]}")
            lines[child] = line
            _collect_lines(value, child, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            child = (*path, str(index))
            lines[child] = value.start_mark.line + 1
            _collect_lines(value, child, lines, name)
