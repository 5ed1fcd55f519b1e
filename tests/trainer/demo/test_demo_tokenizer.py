"""The demo's tokenizer: lossless, digit by digit, and the same for transformers."""

from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quiver_demo.answers import TASKS
from quiver_demo.corpus import corpus_documents
from quiver_demo.tickets import tickets
from quiver_demo.tokenizer import END_OF_TEXT_ID, VOCABULARY_SIZE, write_tokenizer
from quiver_peft.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, corpus_documents(1, 300_000))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def test_tickets_and_answers_come_back_unchanged_and_short(tokenizer: Tokenizer) -> None:
    for ticket in islice(tickets(Random(1)), 60):
        ids = tokenizer.encode(ticket.prompt)
        assert tokenizer.decode(ids) == ticket.prompt and len(ids) <= 130
        for task in TASKS.values():
            answer = f" {task(ticket)}"
            ids = tokenizer.encode(answer)
            assert tokenizer.decode(ids) == answer and len(ids) <= 80


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_unchanged(text: str) -> None:
    tokenizer = Tokenizer(Path("trainer/demo/base"))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.encode("Q-48213"))[-5:] == list("48213")


def test_transformers_reads_the_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    theirs: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    for ticket in islice(tickets(Random(2)), 20):
        assert theirs(ticket.prompt)["input_ids"] == tokenizer.encode(ticket.prompt)
    assert theirs.eos_token_id == theirs.pad_token_id == END_OF_TEXT_ID
    assert len(theirs) == VOCABULARY_SIZE


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, corpus_documents(1, 300_000))
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
