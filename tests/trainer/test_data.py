"""Rows are read strictly: every refusal names the file, the line, the value and the rule."""

from pathlib import Path

import pytest
from tiny import EOS

from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data import encode_row, read_dataset, read_rows, spread_evenly
from quiver_trainer.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'

REFUSED: list[tuple[bytes, str]] = [
    (b"", r"rows.jsonl: holds no rows; each line must be an object such as"),
    (b"\n \n", r"rows.jsonl: holds no rows"),
    (f"{GOOD}\n{{".encode(), r"rows.jsonl:2: not JSON: .*; each line must be an object such as"),
    (f"{GOOD}\n\n[1, 2]".encode(), r"rows.jsonl:3: must be an object such as .*, not \[1, 2\]"),
    (b'{"completion": "b"}', r"rows.jsonl:1: the key 'prompt' is missing; keys here: completion"),
    (b'{"prompt": "a", "answer": "b"}', r"rows.jsonl:1: the key 'completion' is missing; keys here: answer, prompt"),
    (b"{}", r"rows.jsonl:1: the key 'prompt' is missing; keys here: none"),
    (b'{"prompt": 5, "completion": "b"}', r"rows.jsonl:1: 'prompt' must be text, not 5"),
    (b'{"prompt": "a", "completion": null}', r"rows.jsonl:1: 'completion' must be text, not null"),
    (b'{"prompt": "", "completion": "b"}', r"rows.jsonl:1: 'prompt' is empty"),
    (b'{"prompt": "a", "completion": " \\n"}', r"rows.jsonl:1: 'completion' is empty"),
    (b'{"prompt": "a", "completion": "\\ud800"}', r"rows.jsonl:1: 'completion' holds half of a surrogate pair"),
    (f"{GOOD}\n".encode() + b'{"prompt": "\xff"}', r"rows.jsonl:2: not UTF-8: .* at byte 12 of the line"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_bad_rows_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file or directory"):
        read_rows(tmp_path / "none.jsonl")


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{GOOD}\r\n\n{GOOD}".encode() + b'\n{"prompt": "\xc3\xa9 \xe2\x80\xa8", "completion": "x"}'
    )
    rows = read_rows(path)
    assert [row.line for row in rows] == [1, 3, 4]
    assert rows[2].prompt == "é \u2028", "only line feeds end a row"


def test_predictions_need_no_completion(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + GOOD)
    assert [row.completion for row in read_rows(path, need_completion=False)] == [None, "b"]


def test_a_sample_is_prompt_completion_and_end(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Where is it?", "completion": " Here."}')
    tokenizer = Tokenizer(base_folder)
    sample = encode_row(read_rows(path)[0], tokenizer, EOS, path)
    assert sample.tokens[-1] == EOS
    assert tokenizer.decode(sample.tokens[: sample.num_prompt_tokens]) == "Where is it?"
    assert tokenizer.decode(sample.tokens[sample.num_prompt_tokens : -1]) == " Here."


def test_only_long_rows_are_refused_or_left_out(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "aaaaaaaa", "completion": "b"}}\n{GOOD}')
    tokenizer = Tokenizer(base_folder)
    with pytest.raises(DataError, match=r"rows.jsonl:2: prompt \(8 tokens\) and completion \(2 with the end token\)"):
        read_dataset(path, tokenizer, eos=EOS, max_length=9, skip_too_long=False)
    assert len(read_dataset(path, tokenizer, eos=EOS, max_length=10, skip_too_long=False).samples) == 3
    data = read_dataset(path, tokenizer, eos=EOS, max_length=9, skip_too_long=True)
    assert (len(data.samples), data.num_skipped, data.first_skipped) == (2, 1, 2)
    with pytest.raises(DataError, match="all 3 rows are longer than max_length 2 tokens"):
        read_dataset(path, tokenizer, eos=EOS, max_length=2, skip_too_long=True)


def test_spreading_keeps_the_order_and_the_ends_apart(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"prompt": "a{i}", "completion": "b"}}' for i in range(10)))
    samples = read_dataset(path, Tokenizer(base_folder), eos=EOS, max_length=99, skip_too_long=False).samples
    assert [sample.row.line for sample in spread_evenly(samples, 3)] == [1, 4, 7]
    assert spread_evenly(samples, None) == spread_evenly(samples, 99) == samples
