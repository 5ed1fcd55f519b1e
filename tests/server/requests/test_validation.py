"""From messages to parameters: defaults and limits. What is refused is in test_bad_input."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import EOS, VOCAB_SIZE, tiny_tokenizer

from quiver.v1 import generation_pb2
from quiver_peft.tokenizer import Tokenizer
from quiver_server.engine.sequence import FinishReason, TokenLogprob
from quiver_server.errors import InvalidRequestError
from quiver_server.requests.limits import Limits
from quiver_server.requests.validation import FINISH_REASONS, PromptRequest, logprob_message, parse_generate_request

LIMITS = Limits(
    VOCAB_SIZE,
    longest_token=8,
    context_length=32,
    max_prompt=32,
    max_new=32,
    max_source_length=None,
    default_max_new_tokens=12,
    eos_ids=frozenset({EOS}),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return Tokenizer(folder)


def read(tokenizer: Tokenizer, message: generation_pb2.GenerateRequest) -> PromptRequest:
    return parse_generate_request(message, tokenizer, LIMITS)


def test_defaults(tokenizer: Tokenizer) -> None:
    asked = read(tokenizer, generation_pb2.GenerateRequest(text="hello"))
    assert asked.prompt == tokenizer.encode("hello")
    assert (asked.adapter_id, asked.num_candidates, asked.stop_strings) == ("", 1, ())
    assert asked.params.greedy
    assert not asked.params.has_penalties
    assert (asked.params.top_p, asked.params.max_new_tokens) == (1.0, 12)
    assert (asked.params.eos_ids, asked.params.num_top_logprobs) == (frozenset({EOS}), None)


def test_a_seed_is_made_when_missing(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(text="hello")
    first, second = read(tokenizer, message), read(tokenizer, message)
    assert first.params.seed != second.params.seed
    message.sampling.seed = 0
    assert read(tokenizer, message).params.seed == 0, "zero is a seed"


def test_the_answer_is_cut_to_the_context(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5] * 30))
    assert read(tokenizer, message).params.max_new_tokens == 2


def test_ignore_eos_keeps_the_other_stop_tokens(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(text="hello")
    message.stopping.ignore_eos = True
    message.stopping.token_ids.append(9)
    params = read(tokenizer, message).params
    assert (params.eos_ids, params.stop_ids) == (frozenset(), frozenset({9}))


def test_what_would_forbid_every_token_is_refused(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5]))
    message.stopping.token_ids.extend(range(1, 9))
    message.stopping.min_new_tokens = 1
    few = replace(LIMITS, vocab_size=9, eos_ids=frozenset({0}))
    with pytest.raises(InvalidRequestError, match="the whole vocabulary; it must be less, with min_new_tokens"):
        parse_generate_request(message, tokenizer, few)
    message.stopping.ignore_eos = True
    parse_generate_request(message, tokenizer, few)


@given(
    st.integers(0, 40),
    st.floats(allow_nan=True),
    st.floats(allow_nan=True),
    st.integers(0, 2**32 - 1),
    st.integers(0, 99),
)
def test_whatever_comes_is_valid_or_refused(
    tokenizer: Tokenizer, length: int, temperature: float, top_p: float, top_k: int, wanted: int
) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5] * length))
    message.sampling.temperature = temperature
    message.sampling.top_p = top_p
    message.sampling.top_k = top_k
    message.stopping.max_new_tokens = wanted
    try:
        asked = read(tokenizer, message)
    except InvalidRequestError as error:
        assert error.field
        assert str(error)
        return
    assert 0 < asked.params.top_p <= 1
    assert 0 <= asked.params.temperature < float("inf")
    assert len(asked.prompt) + asked.params.max_new_tokens <= LIMITS.context_length


def test_every_finish_reason_has_its_own_word() -> None:
    assert set(FINISH_REASONS) == set(FinishReason)
    assert len(set(FINISH_REASONS.values())) == len(FinishReason)


def test_logprob_message() -> None:
    message = logprob_message(TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.5))))
    assert (message.token_id, message.logprob) == (7, -0.5)
    assert [(other.token_id, other.logprob) for other in message.top] == [(7, -0.5), (9, -1.5)]
