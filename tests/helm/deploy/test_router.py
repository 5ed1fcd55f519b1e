"""Adapter-affine routing by the real Envoy, with the chart's configuration and real servers, and by clients themselves.

The tests share one release and go on from each other: 3 replicas, then 4, one drained, one killed.
"""

import asyncio
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from helm.deploy.routed import DRAIN_SECONDS, Release, get, running_release
from helm.deploy.traffic import PROMPT, Traffic, traffic
from support.tiny import hf_lora, tiny_llama, tiny_tokenizer

from quiver import AdapterState, AsyncClient, Client
from quiver.request_messages import ADAPTER_METADATA_KEY as KEY
from quiver.request_messages import generate_request
from quiver.v1.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.slow
ADAPTERS = [f"adapter-{number}" for number in range(60)]
HOT = "hot"
REPLICAS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
NEW = "127.0.0.5"
LONG = 1500  # tokens of a stream that is still under way when its replica is killed


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("router")
    tiny_llama(base := folder / "base", max_position_embeddings=2 * LONG)
    tiny_tokenizer(base)
    hf_lora(base, folder / "adapters" / HOT, rank=2, targets=["q_proj"])
    for adapter in ADAPTERS:
        shutil.copytree(folder / "adapters" / HOT, folder / "adapters" / adapter)
    with running_release(base, folder / "adapters", *REPLICAS) as release:
        yield release


def owners(release: Release, *, direct: bool = False) -> dict[str, str]:
    """The replica that answers each adapter now: all of three calls, unary and streamed, over two connections.

    direct: past the router, by clients that choose a replica themselves.
    """

    def connect() -> Client:
        return Client(release.direct_target if direct else release.target, timeout_seconds=30, affinity=direct)

    before = release.served()
    for _ in range(2):
        with connect() as client:
            for adapter in ADAPTERS:
                client.generate(PROMPT, adapter=adapter, max_new_tokens=1)
    with connect() as client:
        for adapter in ADAPTERS:
            list(client.stream(PROMPT, adapter=adapter, max_new_tokens=2))
    after = release.served()
    found: dict[str, str] = {}
    for adapter in ADAPTERS:
        (owner,) = (answered := after[adapter] - before.get(adapter, Counter[str]()))
        assert answered[owner] == 3
        found[adapter] = owner
    return found


@pytest.mark.parametrize("direct", [False, True])
def test_sixty_adapters_stick_to_their_replicas(release: Release, direct: bool) -> None:
    owned = owners(release, direct=direct)
    assert owners(release, direct=direct) == owned
    share = Counter(owned.values())
    assert set(share) == set(REPLICAS)
    assert min(share.values()) >= 10, "very unevenly spread"


def test_a_revision_and_the_administration_of_an_adapter_go_to_its_replica(release: Release) -> None:
    """Another client's too, which may send the revision in the metadata."""
    owned = owners(release)
    before = release.served()
    with Client(release.target, timeout_seconds=30) as client, grpc.insecure_channel(release.target) as channel:
        foreign = GenerationServiceStub(channel)
        for adapter in ADAPTERS[:12]:
            found = client.get_adapter(adapter)
            assert found.state is AdapterState.RESIDENT, "asked of a replica that never had it"
            named = f"{adapter}@{found.revision[:12]}"
            client.generate(PROMPT, adapter=named, max_new_tokens=1)
            foreign.Generate(generate_request(PROMPT, adapter=named, max_new_tokens=1), metadata=((KEY, named),))
    after = release.served()
    for adapter in ADAPTERS[:12]:
        assert after[adapter] - before[adapter] == Counter({owned[adapter]: 2})


def test_the_base_is_spread(release: Release) -> None:
    with Client(release.target, timeout_seconds=30) as client:
        for _ in range(30):
            client.generate(PROMPT, max_new_tokens=1)
    assert len(release.served()[""]) == 3


async def test_a_hot_adapter_spills_over_to_the_next_replicas(release: Release) -> None:
    """Bounded load: no replica has more than two thirds (200 % of a third) of what runs."""
    width = 24
    async with AsyncClient(release.target, timeout_seconds=60) as client, asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(Traffic().send(client, HOT, stream=True, num_tokens=60))
    answered = release.served()[HOT]
    assert sum(answered.values()) == width
    assert max(answered.values()) <= width * 2 // 3 + 1
    assert len(answered) >= 2


async def test_from_three_to_four_replicas(release: Release) -> None:
    before = await asyncio.to_thread(owners, release)
    async with traffic(release.target, ADAPTERS) as sent:
        await asyncio.to_thread(release.add, NEW)
        await asyncio.to_thread(release.wait_for_healthy, 4)
        await sent.more()
    assert sent.failed == []
    after = await asyncio.to_thread(owners, release)
    moved = {adapter for adapter in ADAPTERS if after[adapter] != before[adapter]}
    to_new = {adapter for adapter in moved if after[adapter] == NEW}
    assert 6 <= len(to_new) <= 30, "about a quarter"
    assert len(moved - to_new) <= 6, "hashing moves few between the old ones"


async def test_a_replica_that_drains_loses_nothing(release: Release) -> None:
    """SIGTERM while the name still stands for it: harsher than in a cluster, where the name forgets it before."""
    leaving = REPLICAS[0]
    async with traffic(release.target, ADAPTERS) as sent:
        await sent.more()
        release.servers[leaving].signal(signal.SIGTERM)
        assert await asyncio.to_thread(release.servers[leaving].wait) == 0
        release.names.addresses = [address for address in release.names.addresses if address != leaving]
        await asyncio.to_thread(release.wait_for_healthy, 3)
        await sent.more()
    assert sent.failed == []


async def test_a_replica_that_is_killed_loses_what_it_was_computing_and_nothing_else(release: Release) -> None:
    before = await asyncio.to_thread(owners, release)
    direct_before = await asyncio.to_thread(owners, release, direct=True)
    killed = REPLICAS[1]
    lost = [adapter for adapter in ADAPTERS if before[adapter] == killed]
    kept = [adapter for adapter in ADAPTERS if before[adapter] != killed]
    long = Traffic()
    async with (
        AsyncClient(release.target, timeout_seconds=60) as client,
        asyncio.TaskGroup() as group,
        traffic(release.target, ADAPTERS) as sent,
    ):
        await sent.more(12)
        for adapter in (*lost[:2], *kept[:2]):
            group.create_task(long.send(client, adapter, stream=True, num_tokens=LONG))
        await long.streaming(4)
        signalled_seconds = time.monotonic()
        release.servers[killed].signal(signal.SIGKILL)
        await asyncio.to_thread(release.servers[killed].process.wait)
        killed_seconds = time.monotonic()
        await asyncio.to_thread(release.wait_for_healthy, 2)
        await sent.more()
    assert {outcome.adapter for outcome in long.failed} == set(lost[:2]), "its own streams end with an error"
    late = [outcome for outcome in sent.failed if outcome.began_seconds > killed_seconds]
    assert not late, [(outcome.began_seconds - killed_seconds, outcome.error) for outcome in late]
    under_way = [outcome for outcome in sent.failed if outcome.began_seconds < signalled_seconds]
    assert len(under_way) <= 8, "more than were under way"
    after = await asyncio.to_thread(owners, release)
    assert {adapter: after[adapter] for adapter in kept} == {adapter: before[adapter] for adapter in kept}
    assert len({after[adapter] for adapter in lost}) == 2, "both others take some"
    direct_after = await asyncio.to_thread(owners, release, direct=True)  # the name still stands for the killed one
    moved = {adapter for adapter in ADAPTERS if direct_after[adapter] != direct_before[adapter]}
    assert moved == {adapter for adapter in ADAPTERS if direct_before[adapter] == killed}


def test_an_envoy_that_ends_lets_streams_finish(release: Release) -> None:
    """The chart's own preStop command, run beside the router."""
    command = release.router_container()["lifecycle"]["preStop"]["exec"]["command"]
    with Client(release.target, timeout_seconds=30) as client:
        stream = client.stream(PROMPT, adapter=ADAPTERS[0], max_new_tokens=240, ignore_eos=True)
        tokens = len(next(stream).token_ids)
        began = time.monotonic()
        drain = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert "200 OK" in drain.stdout
        assert time.monotonic() - began >= DRAIN_SECONDS
        assert tokens + sum(len(piece.token_ids) for piece in stream) == 240
        client.generate(PROMPT, adapter=ADAPTERS[1], max_new_tokens=1)  # over a new connection
    assert release.stat("envoy_cluster_membership_total") > 0


def test_the_statistics_port_does_nothing_else(release: Release) -> None:
    page = f"http://127.0.0.1:{release.stats_port}"
    assert get(f"{page}/ready")[0] == 200
    for path in ("/", "/config_dump", "/quitquitquit", "/stats", "/ready/../quitquitquit"):
        assert get(page + path)[0] == 404, path
