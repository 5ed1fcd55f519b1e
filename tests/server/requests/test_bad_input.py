"""Impossible requests: their status, field and message; and the server still answers afterwards."""

from typing import Any

import grpc
import pytest
from support.error_assertions import refusal
from support.server_fixture import ServerFixture

from quiver import AdapterNotFound, Client, InvalidRequest
from quiver.v1 import generation_pb2, generation_pb2_grpc

CONTEXT = 256


pytestmark = pytest.mark.usefixtures("still_serving")


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "sampling.temperature is -1.0; it must be 0 or more"),
    ({"temperature": float("nan")}, "sampling.temperature is nan"),
    ({"temperature": float("inf")}, "sampling.temperature is inf"),
    ({"top_p": 0.0}, "sampling.top_p is 0.0; it must be above 0 and at most 1"),
    ({"top_p": 1.5}, "sampling.top_p is 1.5"),
    ({"top_p": float("nan")}, "sampling.top_p is nan"),
    ({"min_p": -0.5}, "sampling.min_p is -0.5; it must be from 0 to 1"),
    ({"min_p": 2.0}, "sampling.min_p is 2.0"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty is 0.0; it must be above 0"),
    ({"repetition_penalty": float("inf")}, "sampling.repetition_penalty is inf"),
    ({"presence_penalty": 2.5}, "sampling.presence_penalty is 2.5; it must be from -2 to 2"),
    ({"frequency_penalty": -3.0}, "sampling.frequency_penalty is -3.0; it must be from -2 to 2"),
    ({"frequency_penalty": float("nan")}, "sampling.frequency_penalty is nan"),
    ({"priority": 11}, "priority is 11; it must be from -10 to 10"),
    ({"priority": -11}, "priority is -11"),
    ({"n": 0}, "sampling.n is 0; it must be from 1 to 16"),
    ({"n": 17, "temperature": 1.0}, "sampling.n is 17"),
    ({"n": 2}, "sampling.n is 2 with temperature 0; it must be 1: all candidates would be the same"),
    ({"max_new_tokens": 0}, "stopping.max_new_tokens is 0; it must be at least 1"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "stopping.min_new_tokens is 9; it must be at most 8"),
    ({"stop": ["x"] * 17}, "stopping.strings is 17; it must be at most 16 strings"),
    ({"stop": [""]}, "stopping.strings is an empty string"),
    ({"stop_token_ids": [320]}, "stopping.token_ids is 320; it must be below the vocabulary size 320"),
    ({"stop": ["x", "y" * 1025]}, "stopping.strings is a string of 1025 characters; it must be at most 1024"),
    ({"stop_token_ids": [5] * 129}, "stopping.token_ids is 129; it must be at most 128 tokens"),
    ({"request_id": "x" * 129}, "request_id is 'xxx"),
    ({"request_id": "two\nlines"}, "request_id is 'two\\nlines'; it must be at most 128 printable ASCII characters"),
    ({"request_id": "ä"}, "request_id is 'ä'"),
    ({"top_logprobs": 21}, "output.top_logprobs is 21; it must be at most 20"),
]


@pytest.mark.parametrize(("options", "fragment"), IMPOSSIBLE, ids=[str(options) for options, _ in IMPOSSIBLE])
def test_impossible_values(client: Client, options: dict[str, Any], fragment: str) -> None:
    error = refusal(lambda: client.generate("hello", **options), InvalidRequest, fragment)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_REQUEST"
    assert isinstance(error, InvalidRequest)
    assert fragment.startswith(error.field_violations[0].field)


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        ("", "the prompt is empty; it must have at least one token"),
        ([], "the prompt is empty; it must have at least one token"),
        ([7, 320], "tokens.ids is 320; it must be below the vocabulary size 320"),
        ([7] * CONTEXT, f"the prompt has {CONTEXT} tokens; with at least one generated token it must fit"),
        ("parcel " * CONTEXT, f"must fit into the context of {CONTEXT}"),
        ("x" * 10_000_000, "text is a text of 10000000 characters; it must be at most"),
    ],
    ids=["text", "tokens", "vocabulary", "context", "long text", "very long text"],
)
def test_impossible_prompts(client: Client, prompt: str | list[int], fragment: str) -> None:
    refusal(lambda: client.generate(prompt), InvalidRequest, fragment)
    refusal(lambda: list(client.stream(prompt)), InvalidRequest, fragment)


def test_longest_prompt_gets_one_token(llama: ServerFixture, client: Client) -> None:
    prompt = [7] * (CONTEXT - 1)
    answer = client.generate(prompt, max_new_tokens=50, ignore_eos=True)
    assert len(answer.token_ids) == 1
    assert answer.finish_reason == "length"


def test_missing_prompt(llama: ServerFixture) -> None:
    with grpc.insecure_channel(llama.server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(generation_pb2.GenerateRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the prompt is missing: set text or tokens" in (caught.value.details() or "")


def test_impossible_texts_to_tokenize(client: Client) -> None:
    refusal(lambda: client.tokenize(""), InvalidRequest, "text is empty; it must be at least one character")
    refusal(lambda: client.tokenize("x" * 10_000_000), InvalidRequest, "text is a text of 10000000 characters")
    refusal(
        lambda: client.score([5], ["x" * 10_000_000]),
        InvalidRequest,
        "continuations[0] is a text of 10000000 characters",
    )
    assert len(client.tokenize("x y " * 400).token_ids) > 256, "longer than a prompt, but no flood"


@pytest.mark.parametrize("adapter_id", ["nobody", "attention-r5", "nobody@abcdef"])
def test_unknown_adapter(client: Client, adapter_id: str) -> None:
    fragment = f"no adapter has the id {adapter_id.partition('@')[0]!r}; ListAdapters names them all"
    error = refusal(lambda: client.generate("hello", adapter=adapter_id), AdapterNotFound, fragment)
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert error.reason == "UNKNOWN_ADAPTER"
    refusal(lambda: list(client.stream("hello", adapter=adapter_id)), AdapterNotFound, fragment)


def test_unknown_adapter_to_manage(client: Client) -> None:
    for call in (client.load_adapter, client.unload_adapter, client.get_adapter):
        refusal(lambda call=call: call("nobody"), AdapterNotFound, "no adapter has the id 'nobody'")


def test_unknown_revision(client: Client) -> None:
    revision = client.load_adapter("attention-r4").revision
    assert client.generate("hello", adapter=f"attention-r4@{revision[:8]}", max_new_tokens=1).adapter is not None
    other = "0" * 12
    refusal(
        lambda: client.generate("hello", adapter=f"attention-r4@{other}"),
        AdapterNotFound,
        f"adapter 'attention-r4' has no revision {other}; kept are: {revision[:12]}",
    )
    refusal(
        lambda: client.generate("hello", adapter="attention-r4@main"), InvalidRequest, "revision 'main' is malformed"
    )


@pytest.mark.parametrize("adapter_id", ["../x", "a/b", "..", ".hidden", "/etc", "a\\b", "a b", "ä", "x" * 129])
def test_malformed_adapter_ids(client: Client, adapter_id: str) -> None:
    fragment = f"adapter_id {adapter_id!r} is malformed"
    refusal(lambda: client.generate("hello", adapter=adapter_id), InvalidRequest, fragment)
    for call in (client.load_adapter, client.unload_adapter, client.get_adapter):
        refusal(lambda call=call: call(adapter_id), InvalidRequest, fragment)
    refusal(lambda: client.load_adapter(adapter_id, source="attention-r4"), InvalidRequest, fragment)
