"""Our thin tokenizer against transformers' AutoTokenizer on the same folder."""

import hashlib
from pathlib import Path

import pytest
from support.tiny import BOS, EOS, edit_json, tiny_tokenizer
from transformers import AutoTokenizer

from quiver_peft import CheckpointError
from quiver_peft.tokenizer import Tokenizer

TEXTS = [
    "Where is my order 12345?",
    "",
    " ",
    "naïve café — 東京 🙂",
    "don't  stop ,  now !\n\n\tok",
    "<|eos|> in the middle <|bos|>",
    "\x00\x7f",
]


@pytest.fixture(params=[False, True], ids=["plain", "with bos"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path, add_bos=request.param)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(text: str, folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_equal_transformers(text: str, folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == text.replace("<|eos|>", "").replace("<|bos|>", "")


def test_special_tokens(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, add_bos=True)
    tokenizer = Tokenizer(tmp_path)
    with_bos = tokenizer.encode("refund")
    assert with_bos[0] == BOS
    assert with_bos[1:] == tokenizer.encode("refund", add_special_tokens=False)
    assert tokenizer.decode([*with_bos, EOS]) == "refund"


def test_each_piece_shows_itself_special_tokens_too(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the parcel", add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(tokenizer.pieces(ids)) == "the parcel"
    assert tokenizer.pieces([EOS]) == ["<|eos|>"]
    assert tokenizer.pieces([]) == []


def test_truncation_and_padding_settings_of_training_touch_no_request(folder: Path) -> None:
    text = "one two three four five six seven eight nine ten"
    before = Tokenizer(folder).encode(text)
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )
    assert len(before) > 4
    assert Tokenizer(folder).encode(text) == before


def test_the_digest_is_that_of_the_file(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_bytes()
    assert Tokenizer(folder).digest == hashlib.sha256(content).hexdigest()


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file; a base folder holds its tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "Magic"}}'])
def test_a_malformed_tokenizer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not readable as a tokenizer"):
        Tokenizer(tmp_path)
