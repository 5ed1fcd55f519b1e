"""Validation of internal requests: defaults, limits and the fields of errors."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import EOS, VOCAB_SIZE, tiny_tokenizer

from quiver.v1 import generation_pb2
from quiver_peft.tokenizer import Tokenizer
from quiver_server.errors import InvalidRequestError
from quiver_server.grpc_api.requests import read_generation_request
from quiver_server.requests.limits import Limits
from quiver_server.requests.prompt_request import GenerationRequest, PromptRequest, ScoringRequest
from quiver_server.requests.validation import validate

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
    (valid,) = validate(read_generation_request(message), tokenizer, LIMITS)
    return valid


def test_defaults(tokenizer: Tokenizer) -> None:
    valid = read(tokenizer, generation_pb2.GenerateRequest(text="hello"))
    assert valid.prompt == tokenizer.encode("hello")
    assert (valid.adapter_id, valid.num_candidates, valid.stop_strings) == ("", 1, ())
    assert valid.params.greedy
    assert not valid.params.has_penalties
    assert (valid.params.top_p, valid.params.max_new_tokens) == (1.0, 12)
    assert (valid.params.eos_ids, valid.params.num_top_logprobs) == (frozenset({EOS}), None)


def test_missing_seed_is_drawn(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(text="hello")
    first, second = read(tokenizer, message), read(tokenizer, message)
    assert first.params.seed != second.params.seed
    message.sampling.seed = 0
    assert read(tokenizer, message).params.seed == 0, "zero is a seed"


def test_max_new_tokens_is_cut_to_the_context(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5] * 30))
    assert read(tokenizer, message).params.max_new_tokens == 2


def test_ignore_eos_keeps_the_other_stop_tokens(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(text="hello")
    message.stopping.ignore_eos = True
    message.stopping.token_ids.append(9)
    params = read(tokenizer, message).params
    assert (params.eos_ids, params.stop_ids) == (frozenset(), frozenset({9}))


def test_stop_tokens_must_leave_a_token(tokenizer: Tokenizer) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5]))
    message.stopping.token_ids.extend(range(1, 9))
    message.stopping.min_new_tokens = 1
    few = replace(LIMITS, vocab_size=9, eos_ids=frozenset({0}))
    with pytest.raises(InvalidRequestError) as caught:
        validate(read_generation_request(message), tokenizer, few)
    assert (caught.value.field, caught.value.value) == ("stop_token_ids", "the whole vocabulary")
    message.stopping.ignore_eos = True
    validate(read_generation_request(message), tokenizer, few)


@given(
    st.integers(0, 40),
    st.floats(allow_nan=True),
    st.floats(allow_nan=True),
    st.integers(0, 2**32 - 1),
    st.integers(0, 99),
)
def test_random_requests_are_valid_or_refused(
    tokenizer: Tokenizer, length: int, temperature: float, top_p: float, top_k: int, wanted: int
) -> None:
    message = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[5] * length))
    message.sampling.temperature = temperature
    message.sampling.top_p = top_p
    message.sampling.top_k = top_k
    message.stopping.max_new_tokens = wanted
    try:
        valid = read(tokenizer, message)
    except InvalidRequestError as error:
        assert error.field
        assert str(error)
        return
    assert 0 < valid.params.top_p <= 1
    assert 0 <= valid.params.temperature < float("inf")
    assert len(valid.prompt) + valid.params.max_new_tokens <= LIMITS.context_length


@pytest.mark.parametrize(
    ("request_", "field", "value", "rule"),
    [
        (GenerationRequest(prompts=("a",), top_p=1.5), "top_p", 1.5, "above 0 and at most 1"),
        (GenerationRequest(prompts=("a", [999])), "token_ids[1]", 999, f"below the vocabulary size {VOCAB_SIZE}"),
        (GenerationRequest(prompts=("a",), max_new_tokens=0), "max_new_tokens", 0, "at least 1"),
        (GenerationRequest(prompts=()), "prompt", "", ""),
        (ScoringRequest(prompts=("a",), continuations=([7], [])), "continuations[1]", "empty", "at least one token"),
    ],
)
def test_errors_carry_field_value_and_rule(
    tokenizer: Tokenizer, request_: GenerationRequest | ScoringRequest, field: str, value: object, rule: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(request_, tokenizer, LIMITS)
    assert (caught.value.field, caught.value.value, caught.value.rule) == (field, value, rule)


def test_prompt_without_generation_becomes_a_scoring_request(tokenizer: Tokenizer) -> None:
    request = GenerationRequest(prompts=("a",), is_generation=False, logprobs=True, prompt_logprobs=True)
    (valid,) = validate(request, tokenizer, LIMITS)
    assert (valid.is_generation, valid.params.max_new_tokens, valid.params.prompt_logprobs) == (False, 1, True)


def test_error_messages_in_terms_of_an_api() -> None:
    error = InvalidRequestError("top_p[2] is 3; it must be at most 1", "top_p[2]", 3, "at most 1")
    assert error.describe({"top_p": "sampling.top_p"}) == (
        "sampling.top_p[2]",
        "sampling.top_p[2] is 3; it must be at most 1",
    )
    plain = InvalidRequestError("the prompt is empty; it must have at least one token", "text")
    assert plain.describe({"text": "prompt"}) == ("prompt", str(plain))
