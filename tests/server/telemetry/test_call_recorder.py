"""Each call leaves one line in the log and one span at a real collector, over both faces, and no secret in either."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support.live_server import LiveServer, eventually
from support.otlp_receivers import Received, attributes, grpc_receiver
from support.server_fixture import ENDURING, LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import Client, QuiverClientError
from quiver.v1 import generation_pb2, generation_pb2_grpc

TOKEN = "secret-token-" + "x" * 16
PROMPT = "My card number is 4929-1234."
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[Received]:
    with grpc_receiver() as received:
        yield received


@pytest.fixture(scope="module")
def told(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory, collector: Received) -> Iterator[ServerFixture]:
    """A server that logs JSON and sends spans."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "tokens.toml").write_text(f'[[token]]\nname = "shop"\ntoken = "{TOKEN}"\nrole = "admin"\n')
    options = ("--http-port", "0", "--log-format", "json", "--token-file", str(folder / "tokens.toml"))
    settings = {name: LLAMA_ADAPTERS[name] for name in ("all-r2", "mlp-r8")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        with running_server(folder, enduring_base, settings, *options, "--otlp-endpoint", collector.endpoint) as bench:
            yield bench
    lines(bench.server)  # each is JSON to the last
    for secret in (TOKEN, PROMPT, "4929", "Bearer"):
        assert secret not in bench.server.log.read_text()
        assert not [span for span in collector.spans if secret in str(span)]


def lines(server: LiveServer) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    return entries


def line_of(server: LiveServer, request_id: str) -> dict[str, Any]:
    """The one line that tells how a call ended."""
    found: list[dict[str, Any]] = []

    def ended() -> bool:
        found[:] = [
            entry
            for entry in lines(server)
            if entry.get("request_id") == request_id and entry["message"] == "call ended"
        ]
        return bool(found)

    eventually(ended)
    assert len(found) == 1
    return found[0]


def span_of(collector: Received, request_id: str) -> Span:
    eventually(lambda: collector.span(request_id) is not None)
    span = collector.span(request_id)
    assert span is not None
    return span


def over_http(
    bench: ServerFixture, request_id: str, body: dict[str, Any] | None = None, **headers: str
) -> httpx2.Response:
    sent = {"authorization": f"Bearer {TOKEN}", "x-request-id": request_id, **headers}
    asked = {"model": "all-r2", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **(body or {})}
    return httpx2.post(f"{bench.server.http_url}/v1/completions", json=asked, headers=sent, timeout=60)


def over_grpc(bench: ServerFixture, request_id: str, metadata: dict[str, str], **fields: Any) -> Any:
    with grpc.insecure_channel(bench.server.target) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        stopping = generation_pb2.Stopping(max_new_tokens=4, ignore_eos=True)
        message = generation_pb2.GenerateRequest(text=PROMPT, stopping=stopping, request_id=request_id, **fields)
        pairs = (("authorization", f"Bearer {TOKEN}"), *metadata.items())
        return list(stub.GenerateStream(message, metadata=pairs, timeout=60))


def test_a_line_says_who_asked_what_and_how_it_ended(told: ServerFixture) -> None:
    over_http(told, "http-1")
    over_grpc(told, "grpc-1", {}, adapter_id="all-r2")
    with told.server.client(TOKEN) as client:
        revision = client.get_adapter("all-r2").revision
    for request_id, call in (("http-1", "POST /v1/completions"), ("grpc-1", "GenerateStream")):
        line = line_of(told.server, request_id)
        assert (line["level"], line["call"], line["code"], line["caller"]) == ("INFO", call, "OK", "shop")
        assert (line["adapter"], line["revision"], line["generated_tokens"]) == ("all-r2", revision, 4)
        assert line["prompt_tokens"] > 4
        assert 0 < line["time_to_first_token_seconds"] < line["seconds"] < 60


def test_a_span_is_in_its_clients_trace_and_tells_the_moments(told: ServerFixture, collector: Received) -> None:
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    over_http(told, "http-2", {"n": 2, "temperature": 1.0}, **parent)
    over_grpc(told, "grpc-2", parent, adapter_id="mlp-r8")
    for request_id, name, adapter in (
        ("http-2", "POST /v1/completions", "all-r2"),
        ("grpc-2", "GenerateStream", "mlp-r8"),
    ):
        span = span_of(collector, request_id)
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")
        assert line_of(told.server, request_id)["trace_id"] == TRACE
        assert (span.name, span.kind) == (name, Span.SPAN_KIND_SERVER)
        assert [event.name for event in span.events] == ["queued", "adapter_ready", "prefill", "decode"]
        times = [span.start_time_unix_nano, *(event.time_unix_nano for event in span.events), span.end_time_unix_nano]
        assert times == sorted(times)
        told_of = attributes(span)
        assert told_of["quiver.adapter"] == adapter
        assert told_of["gen_ai.usage.output_tokens"] == (8 if request_id == "http-2" else 4)
    assert collector.resource["service.name"] == "quiver"
    assert collector.resource["deployment.environment"] == "test"


def test_a_trace_of_its_own_or_none_where_the_client_wants_none(told: ServerFixture, collector: Received) -> None:
    over_http(told, "http-3", traceparent=f"00-{TRACE}-{PARENT}-00")  # not sampled
    over_http(told, "http-4")
    over_http(told, "http-5", traceparent="nonsense")
    own = {span_of(collector, name).trace_id.hex() for name in ("http-4", "http-5")}
    assert len(own | {TRACE}) == 3
    assert collector.span("http-3") is None
    assert line_of(told.server, "http-5")["trace_id"] in own


def test_refused_calls_are_told_too(told: ServerFixture, collector: Received) -> None:
    assert over_http(told, "http-6", {"model": "nobody"}).status_code == 404
    assert over_http(told, "http-7", {"n": 0}).status_code == 400
    assert over_http(told, "http-8", authorization=f"Bearer {TOKEN}x").status_code == 401
    with pytest.raises(grpc.RpcError):
        over_grpc(told, "grpc-6", {}, adapter_id="nobody")
    ends = {
        "http-6": ("NOT_FOUND", "UNKNOWN_ADAPTER"),
        "http-7": ("INVALID_ARGUMENT", "INVALID_REQUEST"),
        "http-8": ("UNAUTHENTICATED", "UNAUTHENTICATED"),
        "grpc-6": ("NOT_FOUND", "UNKNOWN_ADAPTER"),
    }
    for request_id, (code, reason) in ends.items():
        line = line_of(told.server, request_id)
        assert (line["code"], line["reason"]) == (code, reason)
        span = span_of(collector, request_id)
        assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, reason)
        assert attributes(span)["quiver.code"] == code


def test_a_client_that_leaves_is_told_too(told: ServerFixture, collector: Received) -> None:
    with told.server.client(TOKEN) as client:
        stream = client.stream(PROMPT, **{**ENDURING, "request_id": "grpc-9"})
        next(stream)
        stream.close()
    assert line_of(told.server, "grpc-9")["code"] == "CANCELLED"
    assert attributes(span_of(collector, "grpc-9"))["quiver.code"] == "CANCELLED"


def test_what_admins_do_is_told(told: ServerFixture) -> None:
    with told.server.client(TOKEN) as client:
        client.load_adapter("mlp-r8")
        with pytest.raises(QuiverClientError):
            client.load_adapter("nobody")

    def changes() -> list[tuple[str, str]]:
        return [(line["code"], line["caller"]) for line in lines(told.server) if line.get("call") == "LoadAdapter"]

    eventually(lambda: changes() == [("OK", "shop"), ("NOT_FOUND", "shop")])


def test_probes_and_scrapes_leave_no_line(told: ServerFixture) -> None:
    before = len(lines(told.server))
    with told.server.client(TOKEN) as client:
        assert client.is_healthy()
    assert httpx2.get(f"{told.server.http_url}/health").status_code == 200
    for token, status in ((TOKEN, 200), ("nobody's", 401)):
        page = httpx2.get(f"{told.server.http_url}/metrics", headers={"authorization": f"Bearer {token}"})
        assert page.status_code == status
    assert len(lines(told.server)) == before


def test_a_collector_that_is_gone_keeps_nobody_up(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    options = ("--otlp-endpoint", "http://127.0.0.1:1")
    server = LiveServer(llama_base, tmp_path / "adapters", tmp_path / "log", *options)
    with server.client() as client:
        assert isinstance(client, Client)
        client.generate("hello", max_new_tokens=2)
    server.signal()
    assert server.wait(20) == 0
    assert "Traceback" not in server.log.read_text()
