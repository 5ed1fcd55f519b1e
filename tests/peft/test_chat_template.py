"""Chat templates against transformers: what templates of real models use, and what they cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from quiver_peft.chat_template import read_chat_template
from quiver_peft.errors import ChatError, CheckpointError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'. \N{SNOWMAN}"},
    {"role": "user", "content": "  One?\n\n"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?", "name": "Ada"},
]
TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}",
    "blocks leave no lines": "{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "generation prompt": "{{ messages[0].content }}{% if add_generation_prompt %}A:{% endif %}",
    "json is not escaped": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ loop.index0 }}{{ m.content | trim }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation blocks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}",
    "absent tools": "{% if tools %}T{% endif %}{% if not documents %}none{% endif %}{{ tools is none }}",
    "dates": "{{ strftime_now('%Y') }}",
    "macros and slices": "{% macro say(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
    "{% for m in messages[1:] %}{{ say(m) }}{{ m.get('name', '?') }}{% endfor %}",
}


def folder_with(folder: Path, **config: Any) -> Path:
    tiny_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def ours(folder: Path, messages: list[dict[str, Any]] = MESSAGES) -> str:
    template = read_chat_template(folder)
    assert template is not None
    return template.render(messages)


def theirs(folder: Path) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, chat_template=TEMPLATES[name])
    assert ours(folder) == theirs(folder) != ""


def test_where_a_template_stands(tmp_path: Path) -> None:
    assert read_chat_template(folder_with(tmp_path / "none")) is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    named = folder_with(tmp_path / "named", chat_template=several)
    assert ours(named) == theirs(named) == "D<|bos|>"
    (named / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert ours(named) == theirs(named) == "file <|eos|>", "the file of its own wins"
    token = {
        "__type": "AddedToken",
        "content": "<|bos|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    spelled = folder_with(tmp_path / "spelled", chat_template="{{ bos_token }}", bos_token=token)
    assert ours(spelled) == theirs(spelled) == "<|bos|>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('user and assistant take turns') }}", "refuses these messages: user and assistant take"),
        ("{{ messages[9].content }}", "refuses these messages: .*has no element 9"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
    ],
)
def test_what_stops_a_template_is_the_requests_own_failure(tmp_path: Path, template: str, words: str) -> None:
    folder = folder_with(tmp_path, chat_template=template)
    with pytest.raises(ChatError, match=words):
        ours(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"chat_template": "{% for %}"}', "tokenizer_config.json: the chat template, line 1: "),
        ('{"chat_template": [{"name": "default"}]}', "tokenizer_config.json: not readable: KeyError"),
        ("[]", "tokenizer_config.json: must hold a JSON object"),
        ("{", "tokenizer_config.json: not valid JSON: "),
        ("[" * 100_000, "tokenizer_config.json: not valid JSON: nested deeper"),
    ],
)
def test_a_template_that_cannot_be_read(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        read_chat_template(tmp_path)
