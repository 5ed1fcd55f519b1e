"""Recipe documentation: the keys with defaults and meanings, and a run's settings as a commented recipe."""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.recipe.methods import METHOD_SECTIONS

_WIDTH = 110


class _Setting(NamedTuple):
    depth: int
    name: str
    field: FieldInfo
    section: type[BaseModel] | None


def list_settings() -> str:
    """One line for each key: its name, default and meaning."""
    lines: list[str] = []
    for depth, name, field, section in [*_walk(TrainConfig), *_method_settings()]:
        default = "" if section else "(required)" if field.is_required() else _inline(field.default)
        head = f"{'  ' * (depth + 1)}{name}{':' if section else ''}"
        lead = f"{head:<30} {default:<20} "
        hang = " " * len(lead) if len(lead) < 60 else " " * 52
        lines += textwrap.wrap(field.description or "", _WIDTH, initial_indent=lead, subsequent_indent=hang)
    return "\n".join(lines)


def to_recipe(config: TrainConfig) -> str:
    """A run's settings, defaults included, as a commented recipe of the same run."""
    return "".join(_recipe_lines(config, 0))


def _recipe_lines(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        yield from (
            f"{line}\n"
            for line in textwrap.wrap(
                field.description or "", _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        )
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:\n"
            yield from _recipe_lines(value, depth + 1)
        elif name == "adapter" and value is not None:
            yield f"{indent}{name}:\n"
            for method in value:
                lines = "".join(_recipe_lines(method, depth + 2)).splitlines(keepends=True)
                # The dash stands before the first key; comments above it may stay where they are.
                first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
                lines[first] = lines[first].replace("    ", "  - ", 1)
                yield from lines
        else:
            yield f"{indent}{name}: {_inline(section.model_dump(mode='json')[name])}\n"


def _walk(section: type[BaseModel], depth: int = 0) -> Iterator[_Setting]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        nested = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        yield _Setting(depth, name, field, nested)
        if nested is not None:
            yield from _walk(nested, depth + 1)


def _method_settings() -> Iterator[_Setting]:
    for method, section in METHOD_SECTIONS.items():
        heading = FieldInfo(description=f"the keys of an adapter with method: {method}")
        yield _Setting(0, f"adapter ({method})", heading, section)
        yield from _walk(section, 1)


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, tuple):
        value = list(value)  # pyright: ignore[reportUnknownArgumentType]
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
