"""Mutated requests over a real socket: each is answered or refused in the right words, and nobody else notices."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from reliability.message_mutations import change_message
from reliability.mutations import damaged
from reliability.sizes import size
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server

from quiver.request_messages import generate_request, score_request
from quiver.v1 import adapters_pb2, generation_pb2, model_pb2

NUM_CALLS = size(3000, 10_000)
NUM_TOKENS = size(400, 3000)
NUM_IN_FLIGHT = 48
CALL_SECONDS = 30.0
_GENERATION, _ADAPTERS = "/quiver.v1.GenerationService/", "/quiver.v1.AdapterService/"

CALLS: list[tuple[str, Message]] = [
    (_GENERATION + "Generate", generate_request([5, 6, 7, 300], adapter="all-r2", max_new_tokens=2)),
    (_GENERATION + "Generate", generate_request("the parcel", max_new_tokens=3, stop=["e", "or"], logprobs=True)),
    (
        _GENERATION + "Generate",
        generate_request(
            [9, 8, 7], adapter="attention-r4", max_new_tokens=2, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, n=2,
            seed=7, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5, top_logprobs=3,
            prompt_logprobs=True, request_id="mine", priority=3, stop_token_ids=[9], min_new_tokens=1,
        ),
    ),
    (_GENERATION + "Score", score_request([5, 6], [[7, 8], "late"], adapter="all-r2", top_logprobs=2)),
    (_GENERATION + "Tokenize", generation_pb2.TokenizeRequest(text="the box was broken", pieces=True)),
    (_ADAPTERS + "LoadAdapter", adapters_pb2.LoadAdapterRequest(adapter_id="one-r1", source="one-r1", pin=False)),
    (_ADAPTERS + "UnloadAdapter", adapters_pb2.UnloadAdapterRequest(adapter_id="one-r1")),
    (_ADAPTERS + "GetAdapter", adapters_pb2.GetAdapterRequest(adapter_id="one-r1")),
    (_ADAPTERS + "ListAdapters", adapters_pb2.ListAdaptersRequest()),
    ("/quiver.v1.ModelService/GetModel", model_pb2.GetModelRequest()),
]  # fmt: skip


class Damaged(NamedTuple):
    """A call to make. is_whole: its bytes still are a message of this method."""

    method: str
    data: bytes
    is_whole: bool


# What a client's mistake may be called. RESOURCE_EXHAUSTED: many candidates of many requests at once.
RIGHT = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2", "one-r1")}
    with running_server(tmp_path_factory.mktemp("fuzzed"), base, settings) as bench:
        yield bench


def ask_all(bench: ServerFixture, calls: Sequence[Damaged]) -> Iterator[tuple[grpc.StatusCode, str]]:
    """Some dozens at a time; how each ended."""
    with grpc.insecure_channel(bench.server.target) as channel:
        waiting = iter(calls)
        while wave := list(islice(waiting, NUM_IN_FLIGHT)):
            futures: list[Any] = [
                channel.unary_unary(call.method).future(call.data, timeout=CALL_SECONDS) for call in wave
            ]
            for future in futures:
                yield future.code(), future.details()


def damaged_calls(number: int, draw: random.Random) -> Iterator[Damaged]:
    """Half of them bytes that were damaged, half whole messages with values that nobody expects."""
    for i in range(number):
        method, message = CALLS[i // 2 % len(CALLS)]
        if i % 2:
            yield Damaged(method, data := damaged(message.SerializeToString(), draw), parses(message, data))
        else:
            other = type(message)()
            other.CopyFrom(message)
            change_message(other, draw)
            yield Damaged(method, other.SerializeToString(), True)


def parses(message: Message, data: bytes) -> bool:
    try:
        type(message).FromString(data)
    except DecodeError:
        return False
    return True


def test_mutated_messages(bench: ServerFixture) -> None:
    calls = damaged_calls(NUM_CALLS, random.Random(20))
    codes: Counter[str] = Counter()
    with bench.server.client() as client:
        while wave := list(islice(calls, 500)):
            for (code, words), call in zip(ask_all(bench, wave), wave, strict=True):
                codes[code.name] += 1
                assert code in RIGHT, f"{call}: {code} {words}"
                assert call.is_whole or code is grpc.StatusCode.INVALID_ARGUMENT, f"{call} is not a message: {code}"
            for name in ("", "attention-r4"):  # a changed LoadAdapter may rightly give the others' ids other content
                bench.check(client, name)
    print(dict(codes))
    assert min(codes[name] for name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")) > NUM_CALLS / 200, codes
    assert bench.server.metric("quiver_running_sequences") == 0
    assert bench.server.metric("quiver_kv_usage_ratio") == 0


def test_mutated_tokens(base: Path, tmp_path: Path) -> None:
    """What is nearly a token opens nothing; what no header can carry never leaves a client."""
    token = "a-good-token-of-the-operator"
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[token]]\nname = "operator"\ntoken = "{token}"\n')
    draw = random.Random(30)
    good = f"Bearer {token}"
    with running_server(tmp_path / "bench", base, {}, "--token-file", str(file)) as bench:
        with grpc.insecure_channel(bench.server.target) as channel:
            method = channel.unary_unary("/quiver.v1.ModelService/GetModel")
            for _ in range(NUM_TOKENS):
                value = damaged(good.encode(), draw).decode("ascii", "ignore")
                value = "".join(character for character in value if character.isprintable())
                future: Any = method.future(b"", metadata=(("authorization", value),), timeout=CALL_SECONDS)
                scheme, _, shown = value.strip().partition(" ")
                allowed = scheme.lower() == "bearer" and shown.strip() == token
                expected = grpc.StatusCode.OK if allowed else grpc.StatusCode.UNAUTHENTICATED
                assert future.code() is expected, value
        with bench.server.client(token) as client:
            bench.check(client)
