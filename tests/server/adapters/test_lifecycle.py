"""Adapters that come, change, fail and go while others are served."""

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.error_assertions import has_room_again
from support.live_server import answer_tokens, eventually
from support.server_fixture import ENDURING, ServerFixture, running_server
from support.tiny import hf_lora

from quiver import Client, Generation, InvalidRequest, ServerBusy
from quiver.request_messages import GenerateOptions

PROMPT = [9, 20, 31, 42, 53]
LONG: GenerateOptions = {"max_new_tokens": 2000, "ignore_eos": True}
WEIGHTS = "adapter_model.safetensors"


def replace_files(source: Path, folder: Path) -> None:
    """New content in an adapter's folder, as a deployment copies it."""
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)


def test_a_new_folder_is_served(llama: ServerFixture, client: Client) -> None:
    assert "appeared" not in [adapter.id for adapter in client.list_adapters()]
    llama.add("appeared", rank=3, seed=21)
    assert client.get_adapter("appeared").state == "registered"
    assert "appeared" in [adapter.id for adapter in client.list_adapters()]
    llama.check(client, "appeared")
    assert client.get_adapter("appeared").state == "resident"
    client.unload_adapter("appeared")
    shutil.rmtree(llama.adapters / "appeared")
    assert "appeared" not in [adapter.id for adapter in client.list_adapters()]


def test_load_adapter_from_a_source(llama: ServerFixture, client: Client) -> None:
    """A source inside of the adapters folder may lie deeper and have another name than the id."""
    llama.oracles["renamed"] = hf_lora(llama.base, llama.adapters / "team" / "v2", rank=2, seed=31)
    loaded = client.load_adapter("renamed", source="team/v2", pin=True)
    assert (loaded.id, loaded.state, loaded.pinned) == ("renamed", "resident", True)
    llama.check(client, "renamed")


def test_loading_what_has_not_changed_does_nothing(llama: ServerFixture, client: Client) -> None:
    first = client.load_adapter("mlp-r8")
    loads = llama.server.metric("quiver_adapter_loads_total", result="ok")
    assert client.load_adapter("mlp-r8") == first
    assert llama.server.metric("quiver_adapter_loads_total", result="ok") == loads


def test_many_first_requests_load_once(llama: ServerFixture, client: Client) -> None:
    llama.add("popular", rank=8, seed=24, targets="all-linear")
    client.load_adapter("all-r2")  # the count is there once anything was loaded
    loads = llama.server.metric("quiver_adapter_loads_total", result="ok")

    def ask(prompt: list[int]) -> Generation:
        return client.generate(prompt, adapter="popular", max_new_tokens=4)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, [PROMPT] * 12))
    assert len({answer.token_ids for answer in answers}) == 1
    assert llama.server.metric("quiver_adapter_loads_total", result="ok") == loads + 1


def test_a_failed_adapter_is_tried_again_once_it_is_mended(llama: ServerFixture, client: Client) -> None:
    llama.add("mended", rank=4, seed=26)
    path = llama.adapters / "mended" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="not a whole safetensors file"):
            client.generate(PROMPT, adapter="mended")
    failed = client.get_adapter("mended")
    assert failed.state == "failed"
    assert "not a whole safetensors file" in failed.failure_reason
    path.write_bytes(whole)
    llama.check(client, "mended")
    assert client.get_adapter("mended").failure_reason == ""


def test_a_resident_adapter_survives_a_broken_replacement(llama: ServerFixture, client: Client) -> None:
    llama.add("guarded", rank=4, seed=27)
    llama.check(client, "guarded")
    path = llama.adapters / "guarded" / WEIGHTS
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InvalidRequest, match="not a whole safetensors file"):
        client.load_adapter("guarded")
    llama.check(client, "guarded")


def test_a_running_stream_finishes_on_the_old_revision(enduring: ServerFixture, tmp_path: Path) -> None:
    with enduring.server.client() as client:
        enduring.add("changing", rank=4, seed=22)
        oracle = hf_lora(enduring.base, tmp_path / "new", rank=6, seed=23)
        old = client.load_adapter("changing")
        alone = client.generate(PROMPT, **{**LONG, "adapter": "changing"}).token_ids
        stream = client.stream(PROMPT, **{**LONG, "adapter": "changing"})
        first = next(stream)
        replace_files(tmp_path / "new", enduring.adapters / "changing")
        new = client.load_adapter("changing")
        assert new.revision != old.revision
        assert new.rank == 6
        assert enduring.server.metric("quiver_running_sequences") >= 1, "too late to show anything"
        enduring.oracles["changing"] = oracle
        enduring.check(client, "changing")
        assert (*first.token_ids, *(token for piece in stream for token in piece.token_ids)) == alone
        assert client.generate(PROMPT, **{**LONG, "adapter": "changing"}).token_ids != alone
        assert client.generate(PROMPT, adapter=f"changing@{new.revision[:12]}", max_new_tokens=1).token_ids


def test_unload_waits_for_the_running_request(enduring: ServerFixture) -> None:
    with enduring.server.client() as client:
        enduring.add("leaving", rank=4, seed=25)
        loaded = client.load_adapter("leaving")
        free = enduring.server.metric("quiver_adapter_free_bytes")
        expected = client.generate(PROMPT, **{**LONG, "adapter": "leaving"}).token_ids
        stream = client.stream(PROMPT, **{**LONG, "adapter": "leaving"})
        tokens = list(next(stream).token_ids)
        freed: list[int] = []
        unload = threading.Thread(target=lambda: freed.append(client.unload_adapter("leaving")))
        unload.start()
        time.sleep(0.05)
        assert not freed
        assert enduring.server.metric("quiver_running_sequences") == 1, "too late to show anything"
        tokens += [token for piece in stream for token in piece.token_ids]
        unload.join(20)
        assert tuple(tokens) == expected
        assert freed == [loaded.device_bytes + loaded.host_bytes]
        assert enduring.server.metric("quiver_adapter_free_bytes") >= free + loaded.device_bytes
        assert client.get_adapter("leaving").state == "registered"
        assert client.unload_adapter("leaving") == 0
        enduring.check(client, "leaving")


@pytest.fixture(scope="module")
def small(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server whose adapter memory holds two of its five adapters, and that runs four sequences at a time."""
    settings = {f"large-{i}": {"rank": 32, "targets": "all-linear"} for i in range(5)}
    options = ("--adapter-memory-mib", "1", "--max-running", "4", "--max-waiting", "12", "--max-adapter-share", "1")
    with running_server(tmp_path_factory.mktemp("small"), enduring_base, settings, *options) as bench:
        yield bench


def test_eviction_changes_no_answer(small: ServerFixture) -> None:
    names = ["", *(f"large-{i}" for i in range(5))] * 2
    expected = [small.expected(name, PROMPT, 12) for name in names]
    with small.server.client() as client, ThreadPoolExecutor(len(names)) as threads:

        def ask(name: str) -> list[int]:
            return answer_tokens(client.generate(PROMPT, adapter=name, max_new_tokens=12))

        for _ in range(6):
            assert list(threads.map(ask, names)) == expected
    assert small.server.metric("quiver_adapter_evictions_total") >= 3
    assert small.server.metric("quiver_resident_adapters") <= 2


def test_one_that_waits_for_memory_holds_up_nobody(small: ServerFixture) -> None:
    """Two adapters run on all the memory there is; a third waits for it. Base and first answer meanwhile."""
    with small.server.client() as client, ThreadPoolExecutor(1) as thread:
        streams = [client.stream(PROMPT, **{**ENDURING, "adapter": name}) for name in ("large-0", "large-1")]
        for stream in streams:
            next(stream)
        waiting = thread.submit(client.generate, PROMPT, adapter="large-2", max_new_tokens=6)
        eventually(lambda: client.get_adapter("large-2").waiting == 1)
        small.check(client)
        small.check(client, "large-0")
        assert small.server.metric("quiver_running_sequences") == 2, "too late to show anything"
        assert not waiting.done()
        for stream in streams:
            stream.close()
        assert answer_tokens(waiting.result(20)) == small.expected("large-2", PROMPT, 6)


def test_pinned_adapters_are_not_evicted(small: ServerFixture) -> None:
    with small.server.client() as client:
        for name in ("large-0", "large-1"):
            assert client.load_adapter(name, pin=True).pinned
        with pytest.raises(ServerBusy, match=r"no adapter memory for \d+ bytes") as caught:
            client.generate(PROMPT, adapter="large-2")
        assert caught.value.retry_after_seconds == 1
        small.check(client, "large-1")
        client.unload_adapter("large-0")
        small.check(client, "large-2")
        client.unload_adapter("large-1")


def test_an_adapter_larger_than_the_memory_is_refused_and_nobody_evicted(small: ServerFixture) -> None:
    small.add("huge", rank=128, targets="all-linear")
    with small.server.client() as client:
        small.check(client, "large-1")
        evictions = small.server.metric("quiver_adapter_evictions_total")
        with pytest.raises(InvalidRequest, match=r"adapter 'huge' needs \d+ bytes; the whole adapter memory") as caught:
            client.generate(PROMPT, adapter="huge")
        assert caught.value.reason == "ADAPTER_TOO_LARGE"
        assert client.get_adapter("large-1").state == "resident"
        assert small.server.metric("quiver_adapter_evictions_total") == evictions


def test_a_full_queue_refuses_at_once(small: ServerFixture) -> None:
    eventually(lambda: small.server.metric("quiver_running_sequences") == 0)  # what others have closed is gone
    with small.server.client() as client:
        stream = client.stream(PROMPT, **{**ENDURING, "n": 16, "temperature": 1.0, "seed": 1})
        next(stream)
        with pytest.raises(ServerBusy, match="which is all this server holds; try again shortly") as caught:
            client.generate(PROMPT)
        assert caught.value.reason == "BUSY"
        stream.close()
        has_room_again(lambda: client.generate(PROMPT, max_new_tokens=1))
        small.check(client)
