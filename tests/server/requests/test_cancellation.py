"""A client that goes, however it asked: the engine computes nothing more for it."""

import socket
from collections.abc import Callable
from contextlib import closing

import grpc
import pytest
from support.live_server import LiveServer, eventually
from support.server_fixture import ServerFixture

from quiver.request_messages import generate_request
from quiver.v1.generation_pb2_grpc import GenerationServiceStub

NUM_TOKENS = 8000
REQUEST = generate_request([5, 6, 7], max_new_tokens=NUM_TOKENS, ignore_eos=True, n=2, temperature=1.0, seed=1)
BODY = b'{"model": "%s", "prompt": [[5, 6, 7], [8]], "max_tokens": 8000, "ignore_eos": true}'


def running(server: LiveServer) -> float:
    return server.metric("quiver_running_sequences")


def unary(bench: ServerFixture) -> None:
    with grpc.insecure_channel(bench.server.target) as channel:
        call = GenerationServiceStub(channel).Generate.future(REQUEST)
        eventually(lambda: running(bench.server) == 2)
        call.cancel()


def streaming(bench: ServerFixture) -> None:
    with grpc.insecure_channel(bench.server.target) as channel:
        call = GenerationServiceStub(channel).GenerateStream(REQUEST)
        next(call)
        call.cancel()


def http(bench: ServerFixture) -> None:
    host, port = bench.server.http_url.removeprefix("http://").split(":")
    body = BODY % bench.base.name.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with closing(socket.create_connection((host, int(port)))) as raw:
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        eventually(lambda: running(bench.server) == 2)


@pytest.mark.parametrize("ask_and_go", [unary, streaming, http])
def test_what_nobody_waits_for_is_not_computed(
    enduring: ServerFixture, ask_and_go: Callable[[ServerFixture], None]
) -> None:
    """To its end it would take a step for each token."""
    before = enduring.server.metric("quiver_step_seconds_count")
    ask_and_go(enduring)
    eventually(lambda: running(enduring.server) == 0, 60)
    assert enduring.server.metric("quiver_step_seconds_count") - before < NUM_TOKENS / 2
    assert enduring.server.metric("quiver_kv_usage_ratio") == 0
