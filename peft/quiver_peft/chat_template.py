"""The chat template of a base folder: Jinja that renders messages as a prompt.

Rendered with the settings, filters and functions that `apply_chat_template` of transformers gives to templates
(https://huggingface.co/docs/transformers/chat_templating_writing), in a sandbox: templates come with bases.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quiver_peft.errors import ChatError, CheckpointError
from quiver_peft.files.json_files import JsonError, read_json

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Message = dict[str, Any]


class _Generation(Extension):
    """`{% generation %}`: marks what a model is trained on; renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One base's template. Raises CheckpointError when it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: Path) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: the chat template, line {error.lineno}: {error.message}") from None

    def render(self, messages: Sequence[Message], *, for_answer: bool = True) -> str:
        """A chat as text, up to where the assistant's next turn begins unless not `for_answer`.

        Raises ChatError for messages the template refuses.
        """
        own: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": for_answer}
        try:
            return self._template.render(messages=list(messages), **own, **self._special_tokens)
        # A template is code from the base folder and can raise anything.
        except Exception as error:
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise ChatError(f"the base's chat template refuses these messages: {what}") from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a base folder, if it has one. Raises CheckpointError for one that cannot be read."""
    config_path, template_path = folder / _CONFIG_FILE, folder / _TEMPLATE_FILE
    try:
        config = read_json(config_path) if config_path.is_file() else {}
        special_tokens = _special_tokens(config)
        named = _named(config.get("chat_template"))
        own = template_path.read_text("utf-8") if template_path.is_file() else None
    except JsonError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{config_path}: not readable: {type(error).__name__}: {error}") from None
    if own is not None:  # wins over the other file's, as in transformers
        return ChatTemplate(own, special_tokens, template_path)
    return None if named is None else ChatTemplate(named, special_tokens, config_path)


def _named(template: Any) -> str | None:
    """The template of tokenizer_config.json: a string, or the one named "default" of a list."""
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in cast(list[dict[str, str]], template)}.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
