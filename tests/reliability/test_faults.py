"""Clients that vanish, dawdle or only connect; steps that raise; an engine that cannot go on; pools that are full."""

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from reliability.faulty_server import FAULTY_PROMPT
from reliability.process_memory import num_open_files
from reliability.prompts import Question, answer_of, make_questions
from reliability.sizes import size
from support.error_assertions import refusal
from support.live_server import LiveServer, eventually
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import Client, DeadlineExceeded, QuiverClientError, ServerBusy, ServerInternal
from quiver.request_messages import GenerateOptions, generate_request
from quiver.v1.generation_pb2_grpc import GenerationServiceStub

NUM_IDLE = 1000
NUM_HURRIED = size(100, 1000)
LONG: GenerateOptions = {"max_new_tokens": 240, "ignore_eos": True}
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """Its patience with readers is a second; a step with a certain prompt raises."""
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2")}
    launcher = ("-m", "reliability.faulty_server", "step,impatient")
    folder = tmp_path_factory.mktemp("faults")
    with running_server(folder, base, settings, launcher=launcher, faults=10) as bench:
        yield bench


@pytest.fixture
def client(bench: ServerFixture) -> Iterator[Client]:
    """Afterwards nothing runs, nothing is held, and answers are exact."""
    with bench.server.client() as client:
        yield client
        eventually(lambda: bench.server.metric("quiver_running_sequences") == 0)
        eventually(lambda: bench.server.metric("quiver_waiting_sequences") == 0)
        assert bench.server.metric("quiver_kv_usage_ratio") == 0
        eventually(lambda: all(adapter.running == 0 for adapter in client.list_adapters()))
        for name in ("", "attention-r4", "all-r2"):
            bench.check(client, name)


def test_a_step_that_raises_fails_its_requests_and_no_others(bench: ServerFixture, client: Client) -> None:
    for _ in range(5):
        error = refusal(lambda: client.generate(FAULTY_PROMPT, adapter="all-r2"), ServerInternal, "a broken kernel")
        assert error.reason == "ENGINE_FAULT"
        refusal(lambda: list(client.stream(FAULTY_PROMPT)), ServerInternal, "the engine could not compute this")
        bench.check(client, "all-r2")
    assert client.is_healthy()


def test_clients_that_vanish(bench: ServerFixture, client: Client) -> None:
    """Connections that are cut, in the middle of a stream and before its first piece."""
    for number in range(30):
        with bench.server.client() as other:
            stream = other.stream([5, 6, number], **{**LONG, "adapter": "all-r2" if number % 2 else ""})
            if number % 3:
                next(stream)
            other.close()
    eventually(lambda: bench.server.metric("quiver_running_sequences") == 0, seconds=5)
    assert client.unload_adapter("all-r2") > 0, "nobody holds it"


def test_deadlines_before_and_while_running(bench: ServerFixture, client: Client) -> None:
    draw = random.Random(1)
    waits = [draw.choice([0.001, 0.005, 0.02, 0.05, 0.1]) for _ in range(NUM_HURRIED)]

    def ask(seconds: float) -> str:
        with Client(bench.server.target, timeout_seconds=seconds) as hurried:
            try:
                return "whole" if len(hurried.generate([5, 6], **LONG).token_ids) == 240 else "cut"
            except DeadlineExceeded:
                return "late"

    with ThreadPoolExecutor(8) as threads:
        ends = Counter(threads.map(ask, waits))
    assert ends["late"] > NUM_HURRIED / 2 and not ends["cut"], ends


def test_who_does_not_read_is_let_go_and_holds_up_nobody(bench: ServerFixture, client: Client) -> None:
    """More is generated for them than their connections take; rows, adapter and places come back all the same."""
    request = generate_request(
        [5, 6], adapter="all-r2", n=16, temperature=1.0, seed=1, top_logprobs=20, max_new_tokens=240, ignore_eos=True
    )
    narrow = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192))
    channels = [grpc.insecure_channel(bench.server.target, narrow) for _ in range(4)]
    streams = [GenerationServiceStub(channel).GenerateStream(request, timeout=60) for channel in channels]
    for stream in streams:
        next(iter(stream))
    for _ in range(10):
        started = time.monotonic()
        bench.check(client, "attention-r4")
        assert time.monotonic() - started < 5
    eventually(lambda: client.get_adapter("all-r2").running == 0, seconds=60)
    assert client.unload_adapter("all-r2") > 0, "nobody holds it"
    with pytest.raises(grpc.RpcError) as caught:
        for _ in streams[0]:
            pass
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "nothing was read for 1 s: the answer was given up" in (caught.value.details() or "")
    for channel in channels:
        channel.close()


def test_a_thousand_idle_connections(bench: ServerFixture, client: Client) -> None:
    """Half of them speak HTTP/2 and ask nothing, half are silent."""
    host, _, port = bench.server.target.rpartition(":")
    pid = bench.server.process.pid
    before = num_open_files(pid)
    connections = [socket.create_connection((host, int(port)), timeout=20) for _ in range(NUM_IDLE)]
    for connection in connections[::2]:
        connection.sendall(HTTP2_PREFACE)
    eventually(lambda: num_open_files(pid) >= before + NUM_IDLE, seconds=60)
    for seed in range(5):
        bench.check(client, "attention-r4", seed)
    for connection in connections:
        connection.close()
    eventually(lambda: num_open_files(pid) <= before + 5, seconds=60)


def test_an_engine_that_cannot_go_on_ends_the_server(base: Path, tmp_path: Path) -> None:
    """Its requests are told, and the exit code says that nobody asked for it."""
    (tmp_path / "adapters").mkdir()
    launcher = ("-m", "reliability.faulty_server", "engine")
    server = LiveServer(base, tmp_path / "adapters", tmp_path / "log", launcher=launcher)
    with server.client() as client, server.client() as other:
        stream = client.stream([5, 6], **{**LONG, "n": 16, "temperature": 1.0, "seed": 1})
        next(stream)
        words = "the engine has failed and the server is stopping"
        refusal(lambda: other.generate(FAULTY_PROMPT), ServerInternal, words)
        refusal(lambda: list(stream), ServerInternal, words)
        assert server.wait(20) == 1
    assert "the engine cannot go on" in server.log.read_text()


@pytest.fixture(scope="module")
def cramped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """Keys and values of five long requests at most; two of six adapters at once."""
    settings = {f"large-{i}": {"rank": 32, "targets": "all-linear"} for i in range(6)}
    options = ("--kv-memory-mib", "1", "--adapter-memory-mib", "1")
    with running_server(tmp_path_factory.mktemp("cramped"), base, settings, *options) as bench:
        yield bench


def test_full_pools_are_back_pressure(cramped: ServerFixture) -> None:
    """Whoever asks is answered exactly, or told to come again: never an error of the server's own."""
    names = ["", *(f"large-{i}" for i in range(6))]
    questions = [
        Question(name, (9, 20 + i, 31), 100, tuple(cramped.expected(name, [9, 20 + i, 31], 100)))
        for i, name in enumerate(names)
    ] + make_questions(cramped, names, 28)
    with cramped.server.client() as client, ThreadPoolExecutor(35) as threads:

        def ask(question: Question) -> str:
            try:
                return "exact" if answer_of(client, question) == question.answer else "wrong"
            except ServerBusy as busy:
                assert busy.retry_after_seconds
                return "busy"

        for _ in range(3):
            ends = Counter(threads.map(ask, questions))
            assert set(ends) <= {"exact", "busy"}, ends
            assert ends["exact"] > len(questions) / 2
    assert cramped.server.metric("quiver_kv_usage_ratio") == 0
    assert cramped.server.metric("quiver_adapter_evictions_total") > 0


def test_weights_that_overflow_harm_nobody_else(cramped: ServerFixture, tmp_path: Path) -> None:
    """Finite weights whose products are not: the request is told, and blocks that held them serve others exactly."""
    from safetensors.torch import load_file, save_file
    from support.tiny import hf_lora

    hf_lora(cramped.base, tmp_path / "wild", rank=4, seed=1)
    path = tmp_path / "wild" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    (tmp_path / "wild").rename(cramped.adapters / "wild")
    questions = make_questions(cramped, ["", "large-1"], 12, seed=5)
    with cramped.server.client() as client, ThreadPoolExecutor(13) as threads:

        def ask_wild() -> None:
            for number in range(60):
                with pytest.raises(QuiverClientError, match="'wild' computes logits that are not finite"):
                    client.generate([number + 5] * 40, adapter="wild", temperature=float(number % 2))

        def ask(question: Question) -> bool:
            return answer_of(client, question) == question.answer

        wild = threads.submit(ask_wild)
        while not wild.done():
            assert all(threads.map(ask, questions))
        wild.result()
