"""What a chat request says: its messages, read and refused by name, for the base's template."""

from typing import Any, cast

from quiver_peft.chat_template import Message
from quiver_server.errors import InvalidRequestError
from quiver_server.openai_api.parameters import UnsupportedError

_KEYS = {"role", "content", "name"}


def read_messages(value: Any) -> list[Message]:
    """The messages with their content as text. Raises InvalidRequestError."""
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("messages must be a list of at least one message", "messages")
    return [_read_message(item, f"messages[{i}]") for i, item in enumerate(cast(list[object], value))]


def _read_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object with role and content", where)
    message = {key: item for key, item in cast(dict[str, Any], value).items() if item is not None}
    for key in message.keys() - _KEYS:
        raise UnsupportedError(f"{where}.{key} is not supported by this server; leave it out", f"{where}.{key}")
    for key in ("role", "name"):
        if not isinstance(message.get(key, "" if key == "name" else None), str):
            raise InvalidRequestError(f"{where}.{key} must be a text", f"{where}.{key}")
    return {**message, "content": _read_content(message.get("content"), f"{where}.content")}


def _read_content(value: Any, where: str) -> str:
    """A text, or parts of a text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where} must be a text or a list of parts", where)
    texts: list[str] = []
    for part in cast(list[Any], value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UnsupportedError(f"{where} has a part of the type {kind!r}; this server reads texts only", where)
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where} has a part without a text", where)
        texts.append(part["text"])
    return "".join(texts)
