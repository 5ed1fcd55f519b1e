"""JSONL rows of a prompt and a completion, read strictly, and the token ids that a model learns from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.errors import DataError

_EXAMPLE = '{"prompt": "...", "completion": "..."}'


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSONL file. completion: None where the file gives none. line: from 1."""

    prompt: str
    completion: str | None
    line: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as token ids: the prompt with its special tokens, the completion, the end-of-sequence token."""

    tokens: list[int]
    num_prompt_tokens: int
    row: Row


@dataclass(frozen=True)
class Dataset:
    """The samples of a file. sha256: of the file. num_skipped: rows left out as too long, `first_skipped` their first
    line."""

    path: Path
    samples: list[Sample]
    sha256: str
    num_skipped: int = 0
    first_skipped: int = 0


def file_sha256(path: Path) -> str:
    """What identifies a file's content. Raises DataError."""
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def read_rows(path: Path, *, need_completion: bool = True) -> list[Row]:
    """Every row of a file; blank lines are passed over, other keys than the two are not looked at.

    Raises DataError with file and line.
    """
    rows: list[Row] = []
    for number, line in enumerate(_read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            value = _parse_line(line, f"{path}:{number}")
            prompt = _text_field(value, "prompt", f"{path}:{number}")
            wanted = need_completion or "completion" in value
            rows.append(Row(prompt, _text_field(value, "completion", f"{path}:{number}") if wanted else None, number))
    if not rows:
        raise DataError(f"{path}: holds no rows; each line must be an object such as {_EXAMPLE}")
    return rows


def read_dataset(path: Path, tokenizer: Tokenizer, *, eos: int, max_length: int | None, skip_too_long: bool) -> Dataset:
    """The rows of a file as samples.

    Rows of more than `max_length` tokens (None: no limit) are never cut: they are left out and counted, or an error.
    Raises DataError.
    """
    samples: list[Sample] = []
    skipped: list[int] = []
    for row in read_rows(path):
        sample = encode_row(row, tokenizer, eos, path)
        if max_length is None or len(sample.tokens) <= max_length:
            samples.append(sample)
        elif skip_too_long:
            skipped.append(row.line)
        else:
            raise DataError(
                f"{path}:{row.line}: prompt ({sample.num_prompt_tokens} tokens) and completion "
                f"({len(sample.tokens) - sample.num_prompt_tokens} with the end token) are longer than max_length "
                f"{max_length}; shorten the row, or set data.too_long=skip to leave such rows out"
            )
    if not samples:
        raise DataError(f"{path}: all {len(skipped)} rows are longer than max_length {max_length} tokens")
    return Dataset(path, samples, file_sha256(path), len(skipped), skipped[0] if skipped else 0)


def encode_row(row: Row, tokenizer: Tokenizer, eos: int, path: Path) -> Sample:
    """The token ids of a row that has a completion. Raises DataError when its prompt has no tokens."""
    assert row.completion is not None
    prompt = tokenizer.encode(row.prompt)
    if not prompt:
        raise DataError(f"{path}:{row.line}: the tokenizer finds no tokens in the prompt {_shorten(row.prompt)}")
    completion = tokenizer.encode(row.completion, add_special_tokens=False)
    return Sample([*prompt, *completion, eos], len(prompt), row)


def spread_evenly(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """`count` samples at even distances, so that a sorted file is not judged by its head; all where None."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i * len(samples) // count] for i in range(count)]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}; each line must be an object such as {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object such as {_EXAMPLE}, not {_shorten(value)}")
    return value  # pyright: ignore[reportUnknownVariableType]


def _text_field(value: dict[str, Any], key: str, where: str) -> str:
    if key not in value:
        known = ", ".join(sorted(value)) or "none"
        raise DataError(f"{where}: the key {key!r} is missing; keys here: {known}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} must be text, not {_shorten(text)}")
    if not text.strip():
        raise DataError(f"{where}: {key!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no character") from None
    return text


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
