"""Fixtures of the wire's tests: a scripted server and a client of it."""

from collections.abc import Iterator

import pytest
from support.scripted_server import Script, ScriptedServer

from quiver import Client


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def script(server: ScriptedServer) -> Script:
    return server.script


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.target, timeout_seconds=20) as client:
        yield client
