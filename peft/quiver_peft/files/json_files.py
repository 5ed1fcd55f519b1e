"""JSON objects from files and texts of users, read strictly."""

import json
from pathlib import Path
from typing import Any, cast

MAX_DEPTH = 100  # what is nested deeper could not be shown in a message without reaching Python's own limit


class JsonError(ValueError):
    """What was read is not a JSON object. rule: what is wrong, without the name of what was read."""

    def __init__(self, what: str, rule: str) -> None:
        super().__init__(f"{what}: {rule}")
        self.rule = rule


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises JsonError and OSError."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises JsonError. what: names the text in messages, such as its path."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise JsonError(what, _TOO_DEEP) from None
    except ValueError as error:
        raise JsonError(what, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise JsonError(what, f"must hold a JSON object, not {type(value).__name__}")
    if _num_brackets(text) > MAX_DEPTH and _is_deeper(cast(object, value), MAX_DEPTH):
        raise JsonError(what, _TOO_DEEP)
    return cast(dict[str, Any], value)


_TOO_DEEP = f"not valid JSON: nested deeper than {MAX_DEPTH} levels"


def _num_brackets(text: str | bytes) -> int:
    """No value of the text is nested deeper."""
    return text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")


def _is_deeper(value: object, most: int) -> bool:
    level: list[Any] = [value]
    for _ in range(most):
        items = [item.values() if isinstance(item, dict) else item for item in level]
        level = [part for item in items for part in item if isinstance(part, dict | list)]
        if not level:
            return False
    return True
