"""The process: how it starts, refuses to start, drains and exits."""

import os
import socket
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.live_server import LiveServer, eventually, run_refused, spawn
from support.server_fixture import ENDURING

from quiver import QuiverClientError, ServerUnavailable
from quiver_server.adapters.registry import Registry
from quiver_server.cli import run
from quiver_server.config import ServerConfig

PROMPT = [9, 20, 31]
SIGTERM_BIT = 1 << 14


def watch_health(channel: grpc.Channel) -> Iterator[health_pb2.HealthCheckResponse]:
    """What the standard health service tells who watches it."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return iter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))


def test_sigterm_lets_running_streams_finish(enduring_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    server = LiveServer(enduring_base, tmp_path / "adapters", tmp_path / "log")
    with server.client() as client, server.client() as other, grpc.insecure_channel(server.target) as channel:
        expected = client.generate(PROMPT, max_new_tokens=1500, ignore_eos=True).token_ids
        stream = client.stream(PROMPT, max_new_tokens=1500, ignore_eos=True)
        tokens = list(next(stream).token_ids)
        assert other.is_healthy()
        watch = watch_health(channel)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert (server.page_status("/livez"), server.page_status("/readyz")) == (200, 200)
        server.signal()
        eventually(lambda: "draining" in server.log.read_text())
        with pytest.raises(ServerUnavailable):
            other.generate(PROMPT, max_new_tokens=1)
        assert not other.is_healthy()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (server.page_status("/livez"), server.page_status("/readyz")) == (200, 503)
        assert server.process.poll() is None, "too late to show anything"
        tokens += [token for piece in stream for token in piece.token_ids]
    assert tuple(tokens) == expected
    assert server.wait() == 0
    log = server.log.read_text()
    assert "drained" in log
    assert "Traceback" not in log


def test_the_grace_period_ends(enduring_base: Path, tmp_path: Path) -> None:
    """Requests that take longer are cancelled; the exit code is still 0."""
    (tmp_path / "adapters").mkdir()
    server = LiveServer(enduring_base, tmp_path / "adapters", tmp_path / "log", "--grace-seconds", "0.1")
    with server.client() as client:
        stream = client.stream(PROMPT, **{**ENDURING, "n": 16, "temperature": 1.0})
        next(stream)
        server.signal()
        with pytest.raises(QuiverClientError):
            list(stream)
    assert server.wait(10) == 0


def catches_sigterm(pid: int) -> bool:
    """Whether the process has installed a handler."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & SIGTERM_BIT)


def test_help_names_every_option_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for option in fields(ServerConfig):
        assert f"--{option.name.replace('_', '-')} " in text
    assert "is a table [[token]] with name" in " ".join(text.split())


@pytest.mark.parametrize("moment", ["at once", "while importing torch", "just before serving"])
def test_sigterm_while_starting(llama_base: Path, tmp_path: Path, moment: str) -> None:
    (tmp_path / "adapters").mkdir()
    log = tmp_path / "log"
    process = spawn(log, "--base", str(llama_base), "--adapters", str(tmp_path / "adapters"))
    try:
        eventually(lambda: catches_sigterm(process.pid))
        if moment == "at once":
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "the handler came late"
        elif moment == "while importing torch":
            eventually(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), 60)
        else:
            eventually(lambda: "metrics on" in log.read_text(), 60)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_the_process_that_cannot_serve(tmp_path: Path) -> None:
    code, log = run_refused(tmp_path / "log", "--base", str(tmp_path / "nowhere"), "--adapters", str(tmp_path))
    assert code == 2, log
    assert "nowhere/config.json: no such file; a base is a Hugging Face folder" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("changes", "code", "fragment"),
    [
        (["--base", "{tmp}"], 2, "config.json: no such file"),
        (["--adapters", "{tmp}/nowhere"], 2, "nowhere: no such folder; make it, it may be empty"),
        (["--weights", "int3"], 2, "--weights int3: must be auto or dtype"),
        (["--kv-dtype", "float8"], 2, "--kv-dtype float8: must be one of float32, bfloat16, float16, auto"),
        (["--dtype", "bfloat16", "--kv-dtype", "float16"], 2, "only a CPU that computes in float32 caches in another"),
        (["--dtype", "float8"], 2, "--dtype float8: must be one of float32, bfloat16, float16, auto"),
        (["--device", "quantum"], 2, "quantum"),
        (["--port", "{taken}"], 1, "{taken}"),
        (["--port", "0", "--metrics-port", "{taken}"], 1, "in use"),
        (["--port", "70000"], 2, "--port"),
        (["--adapters", "ftp://host/x"], 2, "stores are folders or URLs of s3://, gs://, http://, https://"),
        (["--adapters", "https://me:secret@host/x"], 2, "no user, query or '#'"),
        (["--state", "{state}"], 2, "another server uses it (process {pid}); each server needs its own"),
        (["--dtypo", "float32"], 2, "No such option"),
    ],
)
def test_what_cannot_be_served(
    llama_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    code: int,
    fragment: str,
) -> None:
    """Exit code 2, or 1 where what is given is right, and words that say why. In this process: faster."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        others = Registry(tmp_path / "state")
        values = {"tmp": str(tmp_path), "taken": str(taken.getsockname()[1])}
        values |= {"state": str(others.folder), "pid": str(os.getpid())}
        options = [part.format(**values) for part in changes]
        good = ["--base", str(llama_base), "--adapters", str(tmp_path), "--metrics-port", "-1"]
        assert run([*good, *options]) == code
        others.close()
    said = caplog.text + capsys.readouterr().err
    assert fragment.format(**values) in said
    assert "secret" not in said
