"""Clients that choose among replicas themselves: gRPC's own ring hash over real servers, no router."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from support.scripted_server import ScriptedServer

from quiver import AsyncClient, Client

ADAPTERS = [f"adapter-{number}" for number in range(60)]
VARIABLE = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedServer]]:
    """Three, each of which answers with its own address."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with ScriptedServer() as first, ScriptedServer() as second, ScriptedServer() as third:
        servers = [first, second, third]
        for server in servers:
            server.script.text = server.target
        yield servers


def all_of(servers: list[ScriptedServer]) -> str:
    return "ipv4:" + ",".join(server.target for server in servers)


def owners(client: Client) -> dict[str, str]:
    """The server that answers each adapter: unary, streamed, by revision and to the administration."""
    found: dict[str, str] = {}
    for adapter in ADAPTERS:
        found[adapter] = client.generate("hello", adapter=adapter).text
        assert client.generate("hello", adapter=f"{adapter}@0123").text == found[adapter]
        client.load_adapter(adapter)
    return found


def test_each_adapter_has_its_server(servers: list[ScriptedServer]) -> None:
    with Client(all_of(servers), timeout_seconds=20, affinity=True) as client:
        found = owners(client)
        assert owners(client) == found
    with Client(all_of(servers[::-1]), timeout_seconds=20, affinity=True) as other:
        assert owners(other) == found, "another client, the addresses in another order"
    shares = Counter(found.values())
    assert set(shares) == {server.target for server in servers}
    assert min(shares.values()) >= 10, "very unevenly spread"
    for server in servers:
        assert set(server.script.adapters) == {adapter for adapter in ADAPTERS if found[adapter] == server.target}


async def test_the_asyncio_client_finds_the_same_servers(servers: list[ScriptedServer]) -> None:
    with Client(all_of(servers), timeout_seconds=20, affinity=True) as client:
        found = owners(client)
    async with AsyncClient(all_of(servers), timeout_seconds=20, affinity=True) as client:
        for adapter in ADAPTERS:
            assert (await client.generate("hello", adapter=adapter)).text == found[adapter]


def test_when_a_server_goes_only_its_adapters_move(servers: list[ScriptedServer]) -> None:
    with Client(all_of(servers), timeout_seconds=20, affinity=True) as client:
        before = owners(client)
        gone = servers[0].target
        servers[0].__exit__(None, None, None)
        after = owners(client)
    moved = {adapter for adapter in ADAPTERS if after[adapter] != before[adapter]}
    assert moved == {adapter for adapter in ADAPTERS if before[adapter] == gone}
    assert {after[adapter] for adapter in moved} == {server.target for server in servers[1:]}


def test_the_base_is_spread_and_without_affinity_a_client_stays_where_it_is(servers: list[ScriptedServer]) -> None:
    with Client(all_of(servers), timeout_seconds=20, affinity=True) as client:
        assert len({client.generate("hello").text for _ in range(60)}) == 3
    with Client(all_of(servers), timeout_seconds=20) as client:
        assert len({client.generate("hello", adapter=adapter).text for adapter in ADAPTERS}) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_an_environment_that_forbids_it_is_named(
    kind: type[Client] | type[AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "false")
    with pytest.raises(ValueError, match=f"{VARIABLE} to be true or not set; it is 'false'"):
        kind("localhost:1", affinity=True)
    assert os.environ[VARIABLE] == "false"
