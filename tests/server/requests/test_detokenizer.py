"""Text in pieces: whole characters only, nothing lost, and no stop string ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import VOCAB_SIZE, tiny_tokenizer

from quiver_peft.tokenizer import Tokenizer
from quiver_server.requests.detokenizer import TextStream, token_offsets

IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)
TEXTS = st.text(st.sampled_from("aeß€\N{SNOWMAN}\N{GRINNING FACE} .b"), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return Tokenizer(folder)


def run(stream: TextStream, ids: list[int]) -> list[str]:
    """The pieces of these tokens, until a stop string ends them or the last token did."""
    pieces: list[str] = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@given(ids=IDS)
def test_pieces_make_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tokenizer)
    assert "".join(run(stream, ids)) == stream.text == tokenizer.decode(ids)


@given(text=TEXTS)
def test_a_token_begins_where_the_tokens_before_it_end(tokenizer: Tokenizer, text: str) -> None:
    """Within a character, where that does."""
    ids = tokenizer.encode(text)
    whole = [len(tokenizer.decode(ids[:i]).rstrip("\N{REPLACEMENT CHARACTER}")) for i in range(len(ids))]
    assert token_offsets(tokenizer, ids) == whole


@given(text=TEXTS)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = run(TextStream(tokenizer), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(text=TEXTS, stops=st.lists(st.text("aeß€ b", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_stop_string_ends_the_text(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    """Every token is one byte at most of a new character here, so that the earliest end is the earliest start."""
    ids = [token for character in text for token in tokenizer.encode(character)]
    stream = TextStream(tokenizer, stops)
    shown = "".join(run(stream, ids))
    assert shown == stream.text
    assert stream.stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if not stream.stopped:
        assert shown == text


@given(ids=IDS, stop=st.text("aeß b", min_size=1, max_size=3))
def test_stop_strings_never_leak(tokenizer: Tokenizer, ids: list[int], stop: str) -> None:
    """Whatever the tokens: a token may spell the end of one stop string and more."""
    full = tokenizer.decode(ids)
    stream = TextStream(tokenizer, [stop])
    run(stream, ids)
    assert stream.text == full.partition(stop)[0]
    including = TextStream(tokenizer, [stop], include_stop_string=True)
    run(including, ids)
    head, found, _ = full.partition(stop)
    assert including.text == head + found


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["abc"])
    a, b, x = (tokenizer.encode(character)[0] for character in "abx")
    assert [stream.push(token) for token in (x, a, b, x)] == ["x", "", "", "abx"]
    assert [stream.push(a), stream.finish()] == ["", "a"]


def test_before_min_new_tokens_stop_strings_do_not_stop(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(character)[0] for character in "ab")
    stream = TextStream(tokenizer, ["b"], min_new_tokens=3)
    for token in (b, a, a):
        stream.push(token)
    assert not stream.stopped
    stream.push(b)
    assert stream.stopped
    assert stream.text == "baa"
