"""Rows are read strictly: every refusal names the file, the line, the value and the rule."""

import json
import tracemalloc
from pathlib import Path

import pytest
from support.tiny import EOS, VOCAB_SIZE, edit_json, tiny_tokenizer
from transformers import AutoTokenizer

from quiver_peft.chat_template import read_chat_template
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.dataset import Dataset, evenly_spaced, read_dataset
from quiver_trainer.data.jsonl import Encoder, read_lines
from quiver_trainer.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def encoder(base_folder: Path, max_length: int | None = 99) -> Encoder:
    return Encoder(Tokenizer(base_folder), EOS, VOCAB_SIZE, max_length)


REFUSED: list[tuple[bytes, str]] = [
    (b"", r"rows.jsonl: holds no rows; each line must be an object such as"),
    (b"\n \n", r"rows.jsonl: holds no rows"),
    (f"{GOOD}\n{{".encode(), r"rows.jsonl:2: not valid JSON: .*; each line must be an object such as"),
    (f"{GOOD}\n\n[1, 2]".encode(), r"rows.jsonl:3: must hold a JSON object, not list; each line must be an object"),
    *(
        (f'{GOOD}\n{{"prompt": {"[" * depth}{"]" * depth}}}'.encode(), r"rows.jsonl:2: not valid JSON: nested deeper")
        for depth in (900, 950, 980, 100_000)
    ),
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


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_rows_are_refused(content: bytes, message: str, base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_dataset(path, encoder(base_folder))


def test_a_missing_file_is_refused(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file or directory"):
        read_dataset(tmp_path / "none.jsonl", encoder(base_folder))


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{GOOD}\r\n\n{GOOD}".encode() + b'\n{"prompt": "\xc3\xa9 \xe2\x80\xa8", "completion": "x"}'
    )
    rows = list(read_lines(path))
    assert [row.number for row in rows] == [1, 3, 4]
    assert rows[2].text("prompt") == "é \u2028", "only line feeds end a row"


def test_a_sample_is_prompt_completion_and_end(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Where is it?", "completion": " Here."}')
    tokenizer = Tokenizer(base_folder)
    (sample,) = read_dataset(path, encoder(base_folder))
    assert sample.tokens[-1] == EOS
    assert tokenizer.decode(sample.tokens[: sample.num_prompt_tokens]) == "Where is it?"
    assert tokenizer.decode(sample.tokens[sample.num_prompt_tokens : -1]) == " Here."


def test_only_long_rows_are_refused_or_left_out(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "aaaaaaaa", "completion": "b"}}\n{GOOD}')
    with pytest.raises(DataError, match=r"rows.jsonl:2: prompt \(8 tokens\) and completion \(2 with the end token\)"):
        read_dataset(path, encoder(base_folder, 9))
    assert len(read_dataset(path, encoder(base_folder, 10))) == 3
    data = read_dataset(path, encoder(base_folder, 9), skip_too_long=True)
    assert (len(data), data.files[0].num_skipped, data.files[0].first_skipped) == (2, 1, 2)
    with pytest.raises(DataError, match="all 3 rows are longer than max_length 2 tokens"):
        read_dataset(path, encoder(base_folder, 2), skip_too_long=True)


def test_spreading_keeps_the_order_and_the_ends_apart(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"prompt": "a{i}", "completion": "b"}}' for i in range(10)))
    samples = read_dataset(path, encoder(base_folder))
    tokenizer = Tokenizer(base_folder)
    assert [tokenizer.decode(sample.tokens[:2]) for sample in evenly_spaced(samples, 3)] == ["a0", "a3", "a6"]
    assert evenly_spaced(samples, None) == evenly_spaced(samples, 99) == list(samples)


def test_token_ids_are_taken_as_they_are(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_tokens": [9, 4, 7], "completion_tokens": [5, 2]}')
    (sample,) = read_dataset(path, encoder(base_folder))
    assert (sample.tokens, sample.num_prompt_tokens) == ([9, 4, 7, 5, 2], 3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("[]", r"rows.jsonl:1: 'prompt_tokens' must be a list of token ids, not \[\]"),
        ('"a"', r"must be a list of token ids, not \"a\""),
        (f"[1, {VOCAB_SIZE}]", rf"must be ids from 0 to {VOCAB_SIZE - 1}, not {VOCAB_SIZE}"),
        ("[1, -1]", "must be ids from 0 to"),
        ("[1, true]", "must be ids from 0 to .*, not True"),
        ("[1.0]", "must be ids from 0 to .*, not 1.0"),
    ],
)
def test_bad_token_ids_are_refused(tokens: str, message: str, base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt_tokens": {tokens}, "completion_tokens": [5]}}')
    with pytest.raises(DataError, match=message):
        read_dataset(path, encoder(base_folder))


def test_a_text_is_learnt_whole_in_pieces_of_the_longest_length(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "one two three four five six seven eight nine ten"
    path.write_text(f'{{"text": "{text}"}}')
    pieces = read_dataset(path, encoder(base_folder, 10))
    tokens = [*Tokenizer(base_folder).encode(text), EOS]
    assert [token for piece in pieces for token in piece.tokens] == tokens[: len(tokens) - (len(tokens) % 10 == 1)]
    assert {piece.num_prompt_tokens for piece in pieces} == {1} and max(len(piece.tokens) for piece in pieces) == 10


def test_an_epoch_takes_of_each_file_as_much_as_it_weighs(base_folder: Path, tmp_path: Path) -> None:
    data = Dataset()
    for name, count, weight in (("a", 4, 2.0), ("b", 10, 0.3), ("c", 2, 1.0)):
        path = tmp_path / name
        path.write_text(f"{GOOD}\n" * count)
        data.add_file(path, weight, encoder(base_folder), skip_too_long=False, on_row=lambda: None)
    assert len(data) == 16
    first, again, second = data.epoch(1, 0), data.epoch(1, 0), data.epoch(1, 1)
    assert first == again != second
    for chosen in (first, second):
        assert [sum(i in file.samples for i in chosen) for file in data.files] == [8, 3, 2]
        assert len(set(chosen) & set(range(4, 14))) == 3, "a fraction takes no sample twice"


def test_rows_need_no_memory(base_folder: Path, tmp_path: Path) -> None:
    """What stays is a few numbers for each row: a hundred long rows cost no more than a hundred short ones."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_tokens": [' + ", ".join(["7"] * 20_000) + '], "completion_tokens": [5]}\n')
    tracemalloc.start()
    data = Dataset()
    for _ in range(100):
        data.add_file(path, 1.0, encoder(base_folder, None), skip_too_long=False, on_row=lambda: None)
    size, _ = tracemalloc.get_traced_memory()
    assert data[57].tokens[-2:] == [7, 5] and len(data[57].tokens) == 20_001
    tracemalloc.stop()
    assert size < 200_000 < 4 * sum(data.lengths)


CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


def test_of_a_chat_the_last_turn_is_learnt(base_folder: Path, tmp_path: Path) -> None:
    """The prompt is transformers' own, for the turn that is learnt."""
    tiny_tokenizer(tmp_path)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    tokenizer = Tokenizer(tmp_path)
    chats = Encoder(tokenizer, EOS, VOCAB_SIZE, None, chat_template=read_chat_template(tmp_path))
    (sample,) = read_dataset(path, chats)
    given = tokenizer.encode(expected, add_special_tokens=False)
    assert sample.tokens == [*given, *tokenizer.encode("Here.", add_special_tokens=False), EOS]
    assert sample.num_prompt_tokens == len(given) and EOS in given
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'messages' need a base with a chat template"):
        read_dataset(path, encoder(base_folder))


@pytest.mark.parametrize("messages", [[], CHAT[:1], [CHAT[1], CHAT[0]], "hello", [{"role": "user"}, CHAT[1]], [1, 2]])
def test_what_is_no_chat_to_learn_from_is_refused(messages: object, base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: ('messages' must be at least two|a message is an object)"):
        read_dataset(path, encoder(base_folder))
