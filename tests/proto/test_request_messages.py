"""From Python arguments to the request message: every option, once, into its field."""

from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from quiver import InvalidRequest
from quiver.request_messages import GenerateOptions, generate_request, routing_metadata, score_request
from quiver.v1 import generation_pb2

# option, value, the field it sets, the value there
OPTIONS: list[tuple[str, Any, str, Any]] = [
    ("adapter", "support@0123", "adapter_id", "support@0123"),
    ("temperature", 0.5, "sampling.temperature", 0.5),
    ("top_k", 40, "sampling.top_k", 40),
    ("top_p", 0.25, "sampling.top_p", 0.25),
    ("min_p", 0.125, "sampling.min_p", 0.125),
    ("repetition_penalty", 1.5, "sampling.repetition_penalty", 1.5),
    ("presence_penalty", -0.5, "sampling.presence_penalty", -0.5),
    ("frequency_penalty", 0.75, "sampling.frequency_penalty", 0.75),
    ("seed", 2**63, "sampling.seed", 2**63),
    ("n", 4, "sampling.n", 4),
    ("max_new_tokens", 16, "stopping.max_new_tokens", 16),
    ("min_new_tokens", 2, "stopping.min_new_tokens", 2),
    ("stop", "\n", "stopping.strings", ["\n"]),
    ("stop", ["\n", "END"], "stopping.strings", ["\n", "END"]),
    ("stop_token_ids", (3, 4), "stopping.token_ids", [3, 4]),
    ("ignore_eos", True, "stopping.ignore_eos", True),
    ("include_stop_string", True, "stopping.include_stop_string", True),
    ("logprobs", True, "output.logprobs", True),
    ("top_logprobs", 5, "output.top_logprobs", 5),
    ("prompt_logprobs", True, "output.prompt_logprobs", True),
    ("request_id", "r-1", "request_id", "r-1"),
    ("priority", -7, "priority", -7),
]

# Options for which an explicit zero is not the same as none: the server refuses it, so it must get there.
ZERO_IS_SENT: list[tuple[GenerateOptions, str]] = [
    ({"top_p": 0.0}, "top_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"seed": 0}, "seed"),
    ({"n": 0}, "n"),
]


def _set_fields(message: generation_pb2.GenerateRequest) -> dict[str, Any]:
    """The fields that are set, by path."""
    fields: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            fields[descriptor.name] = value
            continue
        for inner, inner_value in value.ListFields():
            is_scalar = isinstance(inner_value, (bool, int, float, str))
            fields[f"{descriptor.name}.{inner.name}"] = inner_value if is_scalar else list(inner_value)
    return fields


@pytest.mark.parametrize(("option", "value", "field", "expected"), OPTIONS)
def test_each_option_sets_its_field_and_no_other(option: str, value: Any, field: str, expected: Any) -> None:
    options: Any = {option: value}

    assert _set_fields(generate_request("hello", **options)) == {"text": "hello", field: expected}


def test_the_table_above_holds_every_option_and_every_field() -> None:
    assert {option for option, *_ in OPTIONS} == set(GenerateOptions.__annotations__)
    paths = {"adapter_id", "request_id", "priority"}
    parts = {
        "sampling": generation_pb2.Sampling,
        "stopping": generation_pb2.Stopping,
        "output": generation_pb2.Output,
    }
    for part, message in parts.items():
        paths |= {f"{part}.{field.name}" for field in message.DESCRIPTOR.fields}
    assert {field for *_, field, _ in OPTIONS} == paths


def test_without_options_only_the_prompt_is_set() -> None:
    assert _set_fields(generate_request("hello")) == {"text": "hello"}


@pytest.mark.parametrize("option", sorted(GenerateOptions.__annotations__))
def test_none_is_the_same_as_leaving_out(option: str) -> None:
    options: Any = {option: None}

    assert generate_request("hello", **options) == generate_request("hello")


@pytest.mark.parametrize(("options", "field"), ZERO_IS_SENT)
def test_an_impossible_zero_reaches_the_server(options: GenerateOptions, field: str) -> None:
    assert generate_request("hello", **options).sampling.HasField(field)  # pyright: ignore[reportArgumentType]


def test_zero_new_tokens_reach_the_server() -> None:
    assert generate_request("hello", max_new_tokens=0).stopping.HasField("max_new_tokens")


def test_empty_prompts_reach_the_server_as_what_they_are() -> None:
    assert generate_request("").WhichOneof("prompt") == "text"
    assert generate_request([]).WhichOneof("prompt") == "tokens"


@given(prompt=st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_arrive_unchanged(prompt: list[int]) -> None:
    wire = generate_request(prompt).SerializeToString()

    assert list(generation_pb2.GenerateRequest.FromString(wire).tokens.ids) == prompt


@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_arrives_unchanged(prompt: str) -> None:
    wire = generate_request(prompt).SerializeToString()

    assert generation_pb2.GenerateRequest.FromString(wire).text == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 2**32}, "max_new_tokens is 4294967296"),
        ({"min_new_tokens": -2}, "min_new_tokens is -2"),
        ({"n": -1}, "n is -1"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids is -1"),
        ({"seed": -1}, r"seed is -1: it must lie between 0 and 2\^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"priority": 2**31}, r"priority is 2147483648: it must lie between -2\^31 and 2\^31 - 1"),
        ({"adapter": "a\ud800"}, "not valid Unicode"),
        ({"stop": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_value_that_its_field_cannot_hold_is_named(options: GenerateOptions, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate_request("hello", **options)


@pytest.mark.parametrize("prompt", ["half a character \ud800", [-1], [1, 2**32]])
def test_a_prompt_that_its_field_cannot_hold_is_refused(prompt: str | Sequence[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid Unicode|prompt is (-1|4294967296)"):
        generate_request(prompt)


def test_a_misspelt_option_is_named_with_those_there_are() -> None:
    options: Any = {"temprature": 1.0}

    with pytest.raises(TypeError, match=r"'temprature'; the options are: .*temperature"):
        generate_request("hello", **options)


@pytest.mark.parametrize("options", [{"top_k": 1.5}, {"temperature": "hot"}, {"stop": [3]}])
def test_a_value_of_the_wrong_type_is_a_type_error(options: Any) -> None:
    with pytest.raises(TypeError):
        generate_request("hello", **options)


def test_the_message_in_json_is_what_the_contract_says() -> None:
    request = generate_request([1, 2], adapter="support", max_new_tokens=8, stop="END")

    assert MessageToDict(request) == {
        "adapterId": "support",
        "tokens": {"ids": [1, 2]},
        "sampling": {},
        "stopping": {"maxNewTokens": 8, "strings": ["END"]},
        "output": {},
    }


@pytest.mark.parametrize("adapter_id", ["", "@0123", "Ünter", "line\nbreak", "bell\x07"])
def test_no_metadata_for_what_metadata_cannot_carry(adapter_id: str) -> None:
    assert routing_metadata(adapter_id) == ()


@pytest.mark.parametrize("adapter_id", ["support", "support@0123"])
def test_the_adapter_is_in_the_metadata_whatever_its_revision(adapter_id: str) -> None:
    expected = (("x-adapter-id", "support"), ("x-gateway-model-name-rewrite", "support"))
    assert routing_metadata(adapter_id) == expected


@pytest.mark.parametrize(
    ("prompt", "continuations"), [("half \ud800", ["b"]), ("a", ["\ud800"]), ([-1], ["b"]), ("a", [[2**32]])]
)
def test_what_a_score_request_cannot_hold_is_named(prompt: str | list[int], continuations: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid Unicode|a token id is (-1|4294967296)"):
        score_request(prompt, continuations)


def test_one_text_is_not_a_list_of_continuations() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        score_request("hello", " you")


def test_a_misspelt_option_of_score_is_named_with_those_there_are() -> None:
    options: Any = {"adaptr": "x"}

    with pytest.raises(TypeError, match=r"'adaptr'; the options are: adapter, top_logprobs, request_id"):
        score_request("hello", [" you"], **options)
