"""The prompts of a completion: one, or several of one request."""

from typing import Any, cast

from quiver_server.errors import InvalidRequestError
from quiver_server.openai_api.parameters import token_ids


def read_prompts(value: Any) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of several of these. Raises InvalidRequestError."""
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    if isinstance(value, list) and not any(isinstance(item, str | list) for item in items):
        items = [items]  # one prompt of token ids
    return [_read_prompt(item, f"prompt[{i}]" if len(items) > 1 else "prompt") for i, item in enumerate(items)]


def _read_prompt(value: Any, where: str) -> str | list[int]:
    if isinstance(value, str):
        return value
    try:
        return token_ids(value)
    except ValueError:
        raise InvalidRequestError(f"{where} must be a text or a list of token ids", where) from None
