"""Strict reader of JSONL training rows, and their encoding as token ids.

{"prompt": "...", "completion": "..."}                     loss on the completion
{"prompt_tokens": [1, 2], "completion_tokens": [3]}        the same as token ids, taken as they are
{"text": "..."}                                            loss on every token: continued pre-training
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from quiver_peft.chat_template import ChatTemplate, Message
from quiver_peft.errors import ChatError
from quiver_peft.files.json_files import JsonError, parse_json
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.errors import DataError

EXAMPLE = '{"prompt": "...", "completion": "..."}'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one sample: the first `num_prompt_tokens` are the prompt, the loss is on the rest.

    num_prompt_tokens: 0 for raw text that an encoder-decoder corrupts.
    """

    tokens: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class JsonlRow:
    """One parsed row. number: its line, from 1."""

    value: dict[str, Any]
    path: Path
    number: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"

    def text(self, key: str) -> str:
        """A required, non-empty string. Raises DataError."""
        if key not in self.value:
            known = ", ".join(sorted(self.value)) or "none"
            raise DataError(f"{self.where}: the key {key!r} is missing; keys here: {known}")
        text = self.value[key]
        if not isinstance(text, str):
            raise DataError(f"{self.where}: {key!r} must be text, not {_shorten(text)}")
        if not text.strip():
            raise DataError(f"{self.where}: {key!r} is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{self.where}: {key!r} holds half of a surrogate pair, which is no character") from None
        return text

    def messages(self) -> list[Message]:
        """A chat whose last turn is the assistant's. Raises DataError."""
        value = self.value["messages"]
        messages = cast(list[Any], value) if isinstance(value, list) else []
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise DataError(f"{self.where}: a message is an object with role and content, not {_shorten(message)}")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{self.where}: 'messages' must be at least two, the last of them the assistant's")
        return messages

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """A non-empty list of token ids below the vocabulary size. Raises DataError."""
        ids = self.value.get(key)
        if not isinstance(ids, list) or not ids:
            raise DataError(f"{self.where}: {key!r} must be a list of token ids, not {_shorten(ids)}")
        for token in cast(list[Any], ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise DataError(f"{self.where}: {key!r}: must be ids from 0 to {vocab_size - 1}, not {token!r}")
        return cast(list[int], ids)


def read_lines(path: Path) -> Iterator[JsonlRow]:
    """The rows of a file, one at a time; skips blank lines. Raises DataError with file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield JsonlRow(_parse(line, f"{path}:{number}"), path, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Encoder:
    """Encodes rows as samples. eos: appended to completions. max_length: most tokens of a sample; None: no limit.

    corrupt_spans: raw text is for span corruption (encoder-decoder) rather than for continuation.
    """

    tokenizer: Tokenizer
    eos: int
    vocab_size: int
    max_length: int | None
    corrupt_spans: bool = False
    chat_template: ChatTemplate | None = None

    def encode(self, line: JsonlRow) -> list[Sample]:
        """The samples of one row: several for a text longer than `max_length`. Raises DataError."""
        if "text" in line.value:
            return self._chunk_text(line)
        if "messages" in line.value:
            return [self._chat(line)]
        if "prompt_tokens" in line.value or "completion_tokens" in line.value:
            prompt = line.token_ids("prompt_tokens", self.vocab_size)
            completion = line.token_ids("completion_tokens", self.vocab_size)
            return [Sample([*prompt, *completion], len(prompt))]
        text = line.text("prompt")
        prompt = self.tokenizer.encode(text)
        if not prompt:
            raise DataError(f"{line.where}: the tokenizer finds no tokens in the prompt {_shorten(text)}")
        completion = self.tokenizer.encode(line.text("completion"), add_special_tokens=False)
        return [Sample([*prompt, *completion, self.eos], len(prompt))]

    def _chat(self, line: JsonlRow) -> Sample:
        """The prompt equals what the server renders for the last turn."""
        messages = line.messages()
        if self.chat_template is None:
            raise DataError(f"{line.where}: 'messages' need a base with a chat template; this one's folder has none")
        try:
            prompt = self.chat_template.render(messages[:-1])
            whole = self.chat_template.render(messages, for_answer=False)
        except ChatError as error:
            raise DataError(f"{line.where}: {error}") from None
        if not whole.startswith(prompt):
            raise DataError(f"{line.where}: the base's chat template writes a chat anew when an answer is added to it")
        given, learnt = (
            self.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole[len(prompt) :])
        )
        # What a template writes behind the end of a turn is never generated.
        end = len(learnt) - learnt[::-1].index(self.eos) if self.eos in learnt else len(learnt)
        learnt = learnt[:end] if self.eos in learnt else [*learnt, self.eos]
        return Sample([*given, *learnt], len(given))

    def _chunk_text(self, line: JsonlRow) -> list[Sample]:
        tokens = self.tokenizer.encode(line.text("text"), add_special_tokens=not self.corrupt_spans)
        if not self.corrupt_spans:
            tokens.append(self.eos)
        size = self.max_length or len(tokens)
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        # One token alone teaches nothing.
        return [Sample(piece, 0 if self.corrupt_spans else 1) for piece in pieces if len(piece) > 1]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_json(line.decode(), where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except JsonError as error:
        raise DataError(f"{error}; each line must be an object such as {EXAMPLE}") from None


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
