"""Each gRPC call's name: the client's own, from the message or the metadata, or one that the server makes."""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import pytest
from support.server_fixture import ServerFixture

from quiver.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

Call = Callable[..., Any]


def named(call: Call, message: Any, metadata: Mapping[str, str]) -> tuple[grpc.StatusCode, str]:
    """How a call ended, and under which name."""
    pairs = tuple(metadata.items())
    try:
        if isinstance(call, grpc.UnaryStreamMultiCallable):
            answers = call(message, metadata=pairs, timeout=30)
            list(answers)
            ended: Any = answers
        else:
            ended = call.with_call(message, metadata=pairs, timeout=30)[1]  # type: ignore[attr-defined]
    except grpc.RpcError as error:
        ended = error
    trailing = {item.key: item.value for item in ended.trailing_metadata()}
    return ended.code(), trailing["x-request-id"]


@pytest.fixture
def calls(llama: ServerFixture) -> Any:
    with grpc.insecure_channel(llama.server.target) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        yield {"Generate": stub.Generate, "GenerateStream": stub.GenerateStream, "ListAdapters": adapters.ListAdapters}


def request(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text="hello", stopping=generation_pb2.Stopping(max_new_tokens=2), **fields)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_every_end_repeats_the_name(calls: dict[str, Call], method: str) -> None:
    call, ok = calls[method], grpc.StatusCode.OK
    assert named(call, request(), {"x-request-id": "from-metadata"}) == (ok, "from-metadata")
    assert named(call, request(request_id="own"), {"x-request-id": "from-metadata"}) == (ok, "own")
    refused = named(call, request(adapter_id="nobody", request_id="own"), {})
    assert refused == (grpc.StatusCode.NOT_FOUND, "own")
    made = {named(call, request(), {})[1] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("name", ["x" * 129, "two\nlines"])
def test_a_name_that_breaks_the_rule_is_refused(calls: dict[str, Call], name: str) -> None:
    code, given = named(calls["Generate"], request(request_id=name), {})
    assert (code, given != name) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    if "\n" not in name:  # which gRPC itself refuses in metadata
        assert named(calls["GenerateStream"], request(), {"x-request-id": name})[0] is code


def test_calls_about_adapters_have_names_too(calls: dict[str, Call]) -> None:
    listed = named(calls["ListAdapters"], adapters_pb2.ListAdaptersRequest(), {"x-request-id": "list-1"})
    assert listed == (grpc.StatusCode.OK, "list-1")
