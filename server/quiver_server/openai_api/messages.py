"""Chat messages: reads, checks and renders them with the base's chat template. Errors name the message and the key."""

from typing import Any, cast

from quiver_peft.chat_template import ChatTemplate, Message
from quiver_peft.errors import ChatError
from quiver_server.errors import InvalidRequestError
from quiver_server.openai_api.parameters import UnsupportedError

_KEYS = {"role", "content", "name"}


class NoChatTemplateError(InvalidRequestError):
    """The base has no chat template: it is no chat model, or its folder lacks a file."""

    reason = "NO_CHAT_TEMPLATE"


def render_messages(value: Any, template: ChatTemplate | None) -> str:
    """The prompt that the base's template makes of the messages of a body. Raises InvalidRequestError."""
    messages = _read_messages(value)
    if template is None:
        raise NoChatTemplateError(
            "the base has no chat template: its folder needs chat_template.jinja, or chat_template in "
            "tokenizer_config.json; /v1/completions takes plain prompts",
            "messages",
        )
    try:
        return template.render(messages)
    except ChatError as error:
        raise InvalidRequestError(str(error), "messages") from None


def _read_messages(value: Any) -> list[Message]:
    """The messages with their content as text."""
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
