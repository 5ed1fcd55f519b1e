"""Revisions, aliases and unloading, on a real server under traffic: each answer is exact for the revision it names."""

import itertools
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.error_assertions import refusal
from support.live_server import answer_tokens, eventually
from support.server_fixture import ServerFixture, running_server
from support.tiny import hf_greedy, hf_lora

from quiver import AdapterNotFound, CallCancelled, Client, InvalidRequest, ServerBusy, Tier, UnloadPolicy
from quiver.request_messages import GenerateOptions
from quiver_peft.adapters.store.store import AdapterStore, publish

PROMPT = [9, 20, 31, 42, 53]
LONG: GenerateOptions = {"max_new_tokens": 1500, "ignore_eos": True}


class Revisions:
    """One adapter's revisions: how to publish each, and what Hugging Face answers with it, by its digest."""

    def __init__(self, bench: ServerFixture, folder: Path, num: int, adapter_id: str = "support") -> None:
        self.adapter_id = adapter_id
        self._store = AdapterStore(str(bench.adapters))
        self._folders = [folder / f"{adapter_id}-{seed}" for seed in range(num)]
        oracles = [hf_lora(bench.base, path, rank=2 + seed, seed=seed) for seed, path in enumerate(self._folders)]
        self.tokens: dict[str, list[int]] = {}
        self.revisions: list[str] = []
        for index, oracle in enumerate(oracles):
            self.revisions.append(self.publish(index))
            self.tokens[self.revisions[-1]] = hf_greedy(oracle, PROMPT, 8)
        assert len({tuple(tokens) for tokens in self.tokens.values()}) == num, "nothing would tell them apart"
        self.publish(0)

    def publish(self, index: int) -> str:
        """Put a revision in the place of the one before."""
        return publish(self._folders[index], self._store, self.adapter_id)

    def ask(self, client: Client, name: str) -> str:
        """Ask once; the answer must be that of the revision it names, which is returned."""
        answer = client.generate(PROMPT, adapter=name, max_new_tokens=8)
        assert answer.adapter is not None
        assert answer.adapter.id == self.adapter_id
        assert answer_tokens(answer) == self.tokens[answer.adapter.revision]
        return answer.adapter.revision


@pytest.fixture(scope="module")
def bench(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    folder = tmp_path_factory.mktemp("revisions")
    with running_server(folder, enduring_base, {}, "--state", str(folder / "state")) as bench:
        yield bench


@pytest.fixture
def client(bench: ServerFixture) -> Iterator[Client]:
    with bench.server.client() as client:
        yield client


@pytest.fixture(scope="module")
def support(bench: ServerFixture, tmp_path_factory: pytest.TempPathFactory) -> Revisions:
    return Revisions(bench, tmp_path_factory.mktemp("support"), 3)


@contextmanager
def traffic(bench: ServerFixture, revisions: Revisions, *names: str) -> Generator[dict[str, list[str]]]:
    """Asks for each name again and again, from a thread each; gives the revisions that answered, by name."""
    seen: dict[str, list[str]] = {name: [] for name in names}
    done = threading.Event()

    def ask(name: str) -> None:
        with bench.server.client() as client:
            while not done.is_set():
                seen[name].append(revisions.ask(client, name))

    with ThreadPoolExecutor(len(names)) as threads:
        tasks = [threads.submit(ask, name) for name in names]
        try:
            eventually(lambda: all(len(found) >= 2 for found in seen.values()), 30)
            yield seen
        finally:
            done.set()
        for task in tasks:
            task.result()


def test_old_revisions_are_servable_beside_the_new_one(
    bench: ServerFixture, client: Client, support: Revisions
) -> None:
    """The folder was replaced twice; each revision is asked for in one batch with the others."""
    for index in range(3):
        support.publish(index)
        assert client.load_adapter("support").revision == support.revisions[index]
    names = ["support", *(f"support@{revision}" for revision in support.revisions)]
    names += [f"support@{revision[:8]}" for revision in support.revisions]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(partial(support.ask, client), names))
    assert found == [support.revisions[2], *support.revisions, *support.revisions]
    adapter = client.get_adapter("support")
    assert adapter.revisions[0].revision == adapter.revision == support.revisions[2]
    assert {item.revision for item in adapter.revisions} == set(support.revisions)
    assert all(item.disk_bytes and item.host_bytes and item.device_bytes for item in adapter.revisions)
    assert adapter.disk_bytes == sum(item.disk_bytes for item in adapter.revisions)
    for name, fragment in (
        ("support@" + "0" * 12, "has no revision 000000000000; kept are"),
        ("other@abcdef", "other"),
    ):
        refusal(lambda name=name: client.generate(PROMPT, adapter=name), AdapterNotFound, fragment)
    refusal(lambda: client.generate(PROMPT, adapter="support@xyz"), InvalidRequest, "6 to 64 hexadecimal digits")


def test_a_revision_of_one_adapter_is_none_of_another(bench: ServerFixture, client: Client, support: Revisions) -> None:
    bench.add("stranger", rank=3, seed=77)
    bench.check(client, "stranger")
    refusal(
        lambda: client.generate(PROMPT, adapter=f"stranger@{support.revisions[0]}"), AdapterNotFound, "has no revision"
    )


def test_an_alias_moves_in_one_step_under_traffic(bench: ServerFixture, client: Client, support: Revisions) -> None:
    """Before it is answered, the old revision or the new one; after it, the new one. And back again."""
    client.set_alias("live", f"support@{support.revisions[0]}")
    with traffic(bench, support, "live", f"support@{support.revisions[1]}") as seen:
        for revision in [*support.revisions[1:], *reversed(support.revisions)]:
            moved = client.set_alias("live", f"support@{revision[:10]}")
            assert (moved.adapter_id, moved.revision) == ("support", revision)
            assert support.ask(client, "live") == revision
            start = len(seen["live"])
            eventually(lambda start=start: len(seen["live"]) >= start + 3)
            # Of what was under way while it moved, one may name the old one.
            assert seen["live"][start + 1 :] == [revision] * (len(seen["live"]) - start - 1)
    assert set(seen[f"support@{support.revisions[1]}"]) == {support.revisions[1]}
    assert client.delete_alias("live").revision == support.revisions[0]
    refusal(lambda: client.generate(PROMPT, adapter="live"), AdapterNotFound, "no adapter has the id 'live'")
    refusal(lambda: client.delete_alias("live"), AdapterNotFound, "there is no alias 'live'")


def test_a_running_stream_finishes_on_the_aliass_old_revision(
    bench: ServerFixture, client: Client, support: Revisions
) -> None:
    """Tried again where the stream was faster than the move."""
    names = [f"support@{revision}" for revision in support.revisions[:2]]
    alone = client.generate(PROMPT, **{**LONG, "adapter": names[0]}).token_ids
    support.ask(client, names[1])
    was_running = False
    for _ in range(20):
        client.set_alias("live", names[0])
        stream = client.stream(PROMPT, **{**LONG, "adapter": "live"})
        first = next(stream)
        client.set_alias("live", names[1])
        was_running = client.get_adapter("support").running > 0
        assert support.ask(client, "live") == support.revisions[1]
        assert first.adapter is not None
        assert first.adapter.revision == support.revisions[0]
        assert (*first.token_ids, *(token for piece in stream for token in piece.token_ids)) == alone
        if was_running:
            break
    assert was_running, "too late each time to show anything"


def test_an_alias_hides_no_adapter(bench: ServerFixture, client: Client, support: Revisions) -> None:
    refusal(
        lambda: client.set_alias("support", "support"), InvalidRequest, "is the id of an adapter, which it would hide"
    )
    bench.add("unseen", rank=2, seed=5)
    refusal(lambda: client.set_alias("unseen", "support"), InvalidRequest, "is the id of an adapter")
    client.set_alias("came-first", "support")
    bench.add("came-first", rank=2, seed=6)
    hidden = next(adapter for adapter in client.list_adapters() if adapter.id == "came-first")
    assert hidden.state == "failed"
    assert "the alias 'came-first' hides it: requests get support@" in hidden.failure_reason
    support.ask(client, "came-first")
    client.delete_alias("came-first")
    bench.check(client, "came-first")
    for alias, fragment in (("", "is malformed"), ("a/b", "is malformed"), ("a@abcdef", "must be a name alone")):
        refusal(lambda alias=alias: client.set_alias(alias, "support"), InvalidRequest, fragment)
    refusal(lambda: client.set_alias("new", "nobody"), AdapterNotFound, "no adapter has the id 'nobody'")


def test_an_alias_stays_where_it_was_when_the_new_revision_is_malformed(
    bench: ServerFixture, client: Client, support: Revisions
) -> None:
    client.set_alias("live", f"support@{support.revisions[0]}")
    broken = bench.adapters / "broken"
    bench.add("broken", rank=2, seed=8)
    (broken / "adapter_model.safetensors").write_bytes(b"not whole")
    refusal(lambda: client.set_alias("live", "broken"), InvalidRequest, "not a whole safetensors file")
    assert support.ask(client, "live") == support.revisions[0]


def test_loads_and_unloads_race_under_traffic(bench: ServerFixture, client: Client, support: Revisions) -> None:
    """New content, loads and unloads from four sides, while requests run: no error, no answer of another revision."""
    deadline = time.monotonic() + 3
    exact = [f"support@{revision}" for revision in support.revisions[1:]]
    numbers = itertools.count()

    def publish_and_load() -> None:
        with bench.server.client() as own:
            while time.monotonic() < deadline:
                revision = support.publish(next(numbers) % 3)
                assert own.load_adapter("support").revision in (revision, *support.revisions)

    def unload(name: str) -> None:
        with bench.server.client() as own:
            while time.monotonic() < deadline:
                assert own.unload_adapter(name) >= 0

    with (
        traffic(bench, support, "support", *exact) as seen,
        ThreadPoolExecutor(4) as threads,
    ):
        tasks = [threads.submit(publish_and_load), threads.submit(unload, "support")]
        tasks += [threads.submit(unload, f"support@{support.revisions[1]}"), threads.submit(publish_and_load)]
        for task in tasks:
            task.result()
    assert set(seen[f"support@{support.revisions[1]}"]) == {support.revisions[1]}
    assert set(seen[f"support@{support.revisions[2]}"]) == {support.revisions[2]}
    assert len(set(seen["support"])) > 1
    client.unload_adapter("support")
    adapter = client.get_adapter("support")
    assert (adapter.running, adapter.device_bytes) == (0, 0)


def test_unload_refuses_or_cancels_as_asked(bench: ServerFixture, client: Client, support: Revisions) -> None:
    client.unload_adapter("support")
    free = bench.server.metric("quiver_adapter_free_bytes")
    loaded = client.load_adapter("support")
    many: GenerateOptions = {**LONG, "max_new_tokens": 600, "n": 12, "temperature": 1.0, "seed": 3}
    other = client.generate(PROMPT, **many)
    streams = [client.stream(PROMPT, **{**many, "adapter": "support"}), client.stream(PROMPT, **many)]
    tokens: dict[int, list[int]] = {index: [] for index in range(12)}
    firsts = [next(stream) for stream in streams]
    error = refusal(
        lambda: client.unload_adapter("support", running=UnloadPolicy.REFUSE),
        ServerBusy,
        "has 1 requests running and 0",
    )
    assert error.reason == "ADAPTER_IN_USE"
    assert client.get_adapter("support").device_bytes == loaded.device_bytes
    freed = client.unload_adapter("support", running=UnloadPolicy.CANCEL)
    assert freed == loaded.device_bytes + loaded.host_bytes
    assert bench.server.metric("quiver_adapter_free_bytes") == free
    with pytest.raises(CallCancelled, match="adapter 'support' was unloaded by an administrator") as caught:
        list(streams[0])
    assert caught.value.reason == "ADAPTER_UNLOADED"
    for piece in (firsts[1], *streams[1]):
        tokens[piece.index] += piece.token_ids
    assert [tuple(tokens[index]) for index in range(12)] == [item.token_ids for item in other.candidates]
    assert client.unload_adapter("support", running=UnloadPolicy.REFUSE) == 0
    support.ask(client, "support")


def test_prefetch_brings_it_to_main_memory_and_disk(bench: ServerFixture, client: Client) -> None:
    bench.add("ahead", rank=4, seed=41)
    adapter = client.load_adapter("ahead", tier=Tier.HOST)
    assert (adapter.state, adapter.device_bytes) == ("host", 0)
    assert adapter.host_bytes and adapter.disk_bytes
    assert client.get_adapter("ahead") == adapter
    bench.check(client, "ahead")
    assert client.get_adapter("ahead").state == "resident"
    refusal(lambda: client.load_adapter("ahead", tier=Tier.HOST, pin=True), InvalidRequest, "must not be set")
    bench.add("cut", rank=4, seed=42)
    (bench.adapters / "cut" / "adapter_model.safetensors").write_bytes(b"cut")
    refusal(lambda: client.load_adapter("cut", tier=Tier.HOST), InvalidRequest, "not a whole safetensors file")
    assert client.get_adapter("cut").state == "failed"


def test_pins_are_put_on_and_taken_off(bench: ServerFixture, client: Client, support: Revisions) -> None:
    assert client.load_adapter("support", pin=True).pinned
    assert client.load_adapter("support").pinned, "what is not said stays"
    assert not client.load_adapter("support", pin=False).pinned
    exact = f"support@{support.revisions[0]}"
    pinned = {item.revision for item in client.load_adapter(exact, pin=True).revisions if item.pinned}
    assert pinned == {support.revisions[0]}
    client.unload_adapter(exact)
    assert not any(item.pinned for item in client.get_adapter("support").revisions)


def test_a_watch_begins_with_all_and_tells_every_last_state(bench: ServerFixture, client: Client) -> None:
    bench.add("watched", rank=4, seed=51)
    changes = client.watch_adapters()
    first = next(changes)
    assert first.is_snapshot
    assert {item.id for item in first.adapters} >= {"watched", "support"}
    states: list[str] = []
    seen = threading.Event()

    def read() -> None:
        for change in changes:
            assert not change.is_snapshot
            states.extend(item.state for item in change.adapters if item.id == "watched")
            if "watched" in change.removed_ids:
                seen.set()
                return

    thread = threading.Thread(target=read)
    thread.start()
    client.load_adapter("watched")
    eventually(lambda: states[-1:] == ["resident"])
    client.unload_adapter("watched")
    eventually(lambda: states[-1:] == ["registered"])
    for path in (bench.adapters / "watched").iterdir():
        path.unlink()
    (bench.adapters / "watched").rmdir()
    assert seen.wait(20)
    thread.join()
    assert states[0] in ("loading", "resident")


def test_a_slow_watcher_gets_the_last_state_and_holds_up_nobody(bench: ServerFixture, client: Client) -> None:
    """It reads nothing while an adapter comes and goes a hundred times."""
    bench.add("restless", rank=4, seed=52)
    with bench.server.client() as slow:
        changes = slow.watch_adapters()
        next(changes)
        for _ in range(100):
            client.load_adapter("restless")
            client.unload_adapter("restless")
        client.load_adapter("restless", pin=True)
        num_read = 0
        for change in changes:
            num_read += 1
            if any(item.id == "restless" and item.pinned for item in change.adapters):
                break
        assert num_read < 300
    client.unload_adapter("restless")
