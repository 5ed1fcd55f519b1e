"""The adapter memory when it is short: who is next, who gives way, and nobody else feels it. Real folders and banks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hf_lora

from quiver_peft.adapters.formats.adapter_folder import parse_adapter, read_adapter
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.base.gpt import GPTBase
from quiver_server.adapters import memory as memory_module
from quiver_server.adapters.admin import AdapterAdmin
from quiver_server.adapters.entry import LoadedRevision
from quiver_server.adapters.manager import AdapterManager
from quiver_server.adapters.open import open_adapters
from quiver_server.errors import BusyError, UnknownAdapterError
from quiver_server.telemetry.metrics import Metrics

RANKS = {**{f"r4-{i}": 4 for i in range(5)}, "r8": 8, "r12": 12}
Opened = tuple[AdapterManager, AdapterAdmin]
Store = Callable[..., Opened]


@pytest.fixture(scope="module")
def folder(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that take room in proportion to their ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        hf_lora(llama_base, folder / name, rank=rank, seed=seed)
    return folder


@pytest.fixture
async def make_store(folder: Path, llama_base: Path) -> AsyncIterator[Store]:
    """Makes stores whose memory holds adapters of so many ranks together."""
    base = GPTBase.from_pretrained(llama_base)
    read, parse = partial(read_adapter, base=base), partial(parse_adapter, base=base)
    one = AdapterBanks(2**24, torch.float32, torch.device("cpu")).num_bytes(read(folder / "r4-0")) // 4
    opened: list[Opened] = []

    def make(ranks: float, disk_bytes: int = 2**24) -> Opened:
        banks = AdapterBanks(int(one * ranks), torch.float32, torch.device("cpu"))
        metrics, sizes = Metrics(), {"host_bytes": 2**24, "disk_bytes": disk_bytes}
        opened.append(open_adapters([str(folder)], None, banks, parse, metrics, **sizes))
        return opened[-1]

    yield make
    for store, _ in opened:
        store.close()


def resident(store: AdapterManager) -> set[str]:
    return {entry.id for entry in store.names.known if entry.resident is not None}


def reload_alike(store: AdapterManager) -> None:
    """As measured, one takes many times as long as another where the machine is busy, and is worth as much more."""
    for entry in store.names.known:
        if entry.resident is not None:
            entry.resident.reload_seconds = 0.01


async def use(store: AdapterManager, *names: str) -> None:
    """Requests that end at once."""
    for name in names:
        await store.release(await store.acquire(name))


async def soon(work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, 10)


async def test_who_was_used_most_stays(make_store: Store) -> None:
    store, _ = make_store(8)
    await use(store, "r4-0", "r4-1")
    reload_alike(store)
    await use(store, *["r4-0"] * 8, "r4-1", "r4-2")
    assert resident(store) == {"r4-0", "r4-2"}
    reload_alike(store)
    await use(store, "r4-2")
    await use(store, "r4-3")
    assert resident(store) == {"r4-0", "r4-3"}


async def test_a_large_one_gets_the_room_of_several(make_store: Store) -> None:
    store, _ = make_store(12)
    await use(store, "r4-0", "r4-1", "r4-2")
    await use(store, "r8")
    assert len(resident(store)) == 2
    await use(store, "r12")
    assert resident(store) == {"r12"}


async def test_gaps_that_are_too_small_alone_are_joined(make_store: Store) -> None:
    """8 of 16 ranks are free, in two pieces; the one between them gives way, though the other was used less."""
    store, admin = make_store(16)
    await use(store, "r4-0", "r4-1", "r4-2", "r4-3")
    await use(store, "r4-1", "r4-1")
    for name in ("r4-0", "r4-2"):
        await admin.unload(name)
    await use(store, "r12")
    assert resident(store) == {"r12", "r4-3"}


async def test_one_that_waits_for_room_holds_up_nobody(make_store: Store) -> None:
    """Requests for what is resident go on, before and after it has waited."""
    store, _ = make_store(8)
    leases = [await store.acquire(name) for name in ("r4-0", "r4-1")]
    waiting = asyncio.create_task(store.acquire("r4-2"))
    await asyncio.sleep(0.1)
    await soon(use(store, "r4-0", "r4-1"))
    assert not waiting.done()
    await store.release(leases.pop())
    assert (await soon(waiting)).id == "r4-2"
    assert resident(store) == {"r4-0", "r4-2"}


async def test_who_waits_first_gets_room_first(make_store: Store) -> None:
    store, _ = make_store(4)
    lease = await store.acquire("r4-0")
    order: list[str] = []

    async def ask(name: str) -> None:
        found = await store.acquire(name)
        order.append(name)
        await store.release(found)

    tasks: list[asyncio.Task[None]] = []
    for name in ("r4-1", "r4-2", "r4-3", "r4-2"):
        tasks.append(asyncio.create_task(ask(name)))
        await asyncio.sleep(0.05)
    await store.release(lease)
    await soon(asyncio.gather(*tasks))
    assert order == ["r4-1", "r4-2", "r4-2", "r4-3"]


async def test_who_holds_the_memory_for_ever_is_drained(make_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters are never without a request; a third waits. The one with least to do ends, gives way, comes back."""
    monkeypatch.setattr(memory_module, "_DRAIN_AFTER_SECONDS", 0.2)
    store, _ = make_store(8)
    stop = asyncio.Event()
    served: list[str] = []

    async def keep_busy(name: str, num_tokens: int) -> None:
        lease = await store.acquire(name)
        lease.num_remaining_tokens += num_tokens
        while not stop.is_set():
            await asyncio.sleep(0.01)
            following = asyncio.create_task(store.acquire(name))
            await asyncio.sleep(0.01)
            lease.num_remaining_tokens -= num_tokens
            await store.release(lease)
            lease = await following
            lease.num_remaining_tokens += num_tokens
            served.append(name)
        await store.release(lease)

    busy = [asyncio.create_task(keep_busy(*item)) for item in (("r4-0", 500), ("r4-1", 20))]
    await asyncio.sleep(0.1)
    third = await soon(store.acquire("r4-2"))
    assert resident(store) == {"r4-0", "r4-2"}
    await asyncio.sleep(0.1)
    assert served[-1] == "r4-0"
    await store.release(third)
    served.clear()

    async def both() -> None:
        while set(served) != {"r4-0", "r4-1"}:
            await asyncio.sleep(0.01)

    await soon(both())
    stop.set()
    await soon(asyncio.gather(*busy))


async def test_pinned_ones_leave_no_room(make_store: Store) -> None:
    store, admin = make_store(8)
    for name in ("r4-0", "r4-1"):
        await admin.load(name, pin=True)
    with pytest.raises(BusyError, match="all resident adapters are pinned or in use"):
        await soon(store.acquire("r4-2"))
    assert resident(store) == {"r4-0", "r4-1"}


async def test_storms_lose_nothing(make_store: Store) -> None:
    """200 requests for 7 adapters through memory for 2 or 3, all at once."""
    store, _ = make_store(12)
    names = list(RANKS)
    held: set[int] = set()

    async def ask(i: int) -> LoadedRevision:
        found = await store.acquire(names[i * i % 7])
        assert not found.released.is_set()
        held.add(found.slot)
        await asyncio.sleep(0.001 * (i % 5))
        assert not found.released.is_set(), "taken from under a request"
        await store.release(found)
        return found

    found = await asyncio.wait_for(asyncio.gather(*(ask(i) for i in range(200))), 60)
    assert [item.id for item in found] == [names[i * i % 7] for i in range(200)]
    assert all(entry.resident is None or entry.resident.num_leases == 0 for entry in store.names.known)


async def test_a_disk_without_room_serves_but_keeps_no_alias(make_store: Store) -> None:
    store, admin = make_store(8, disk_bytes=0)
    await use(store, "r4-0")
    assert store.reader.disk.num_bytes == 0
    with pytest.raises(BusyError, match=r"has no room to keep r4-0@\w+ for an alias \(--cache-mib\)"):
        await admin.set_alias("live", "r4-0")
    assert store.registry.state.aliases == {}
    with pytest.raises(UnknownAdapterError):
        await store.acquire("live")
