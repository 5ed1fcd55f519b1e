"""The asyncio client against a real server on a real socket."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.scripted_server import ENDLESS, FAIL_HALFWAY, REVISION, Script, ScriptedServer

from quiver import (
    AdapterChanges,
    AdapterState,
    AsyncClient,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    Tier,
    UnloadPolicy,
)
from quiver.errors import AdapterNotFound, CallCancelled, ServerInternal, ServerUnavailable
from quiver.results import AdapterRef
from quiver.v1 import adapters_pb2


@pytest_asyncio.fixture
async def aclient(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout_seconds=20) as client:
        yield client


async def _is_set(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, 5)


async def test_generate_answers_with_everything_the_server_said(aclient: AsyncClient, script: Script) -> None:
    answer = await aclient.generate("hello", adapter="support", max_new_tokens=3, request_id="r-1")

    assert answer.text == "one two three"
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.adapter == AdapterRef(id="support", revision=REVISION, methods=("lora",))
    assert answer.request_id == "r-1"
    assert script.metadata["x-adapter-id"] == "support"


async def test_calls_run_at_the_same_time(aclient: AsyncClient) -> None:
    answers = await asyncio.gather(*(aclient.generate("hello", request_id=f"r-{i}") for i in range(8)))

    assert [answer.request_id for answer in answers] == [f"r-{i}" for i in range(8)]


async def test_score_answers_for_each_continuation(aclient: AsyncClient, script: Script) -> None:
    scoring = await aclient.score([5], [[7], " b"], adapter="support")

    assert [score.is_greedy for score in scoring.scores] == [True, False]
    assert list(script.score_request.tokens.ids) == [5]
    assert script.metadata["x-adapter-id"] == "support"


async def test_a_stream_comes_piece_by_piece(aclient: AsyncClient, script: Script) -> None:
    first, last = [piece async for piece in aclient.stream("hello", adapter="support")]

    assert first.adapter == AdapterRef(id="support", revision=REVISION, methods=("lora",))
    assert (first.text, last.text) == ("first", " last")
    assert (first.finish_reason, last.finish_reason) == (None, FinishReason.EOS)
    assert last.usage is not None and last.usage.generated_tokens == 3
    assert script.metadata["x-adapter-id"] == "support"


async def test_leaving_a_stream_early_cancels_the_call(aclient: AsyncClient, script: Script) -> None:
    async for piece in aclient.stream(ENDLESS):
        assert piece.text == "first"
        break

    assert await _is_set(script.stream_was_cancelled)


async def test_closing_a_held_stream_cancels_the_call(aclient: AsyncClient, script: Script) -> None:
    pieces = aclient.stream(ENDLESS)
    await anext(pieces)
    await asyncio.sleep(0.1)
    assert not script.stream_was_cancelled.is_set()

    await pieces.aclose()

    assert await _is_set(script.stream_was_cancelled)


async def test_cancelling_the_task_that_reads_a_stream_cancels_the_call(aclient: AsyncClient, script: Script) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in aclient.stream(ENDLESS):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await _is_set(script.stream_was_cancelled)


async def test_a_stream_that_fails_halfway_gives_what_came_and_then_the_error(aclient: AsyncClient) -> None:
    pieces = aclient.stream(FAIL_HALFWAY)

    assert (await anext(pieces)).text == "first"
    with pytest.raises(ServerInternal, match="the engine stopped"):
        await anext(pieces)


async def test_a_stream_with_a_wrong_option_fails_before_its_first_piece(aclient: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="top_k is -1"):
        aclient.stream("hello", top_k=-1)


async def test_tokenize(aclient: AsyncClient) -> None:
    tokens = await aclient.tokenize("to be or", pieces=True)

    assert (tokens.token_ids, tokens.pieces) == ((2, 2, 2), ("to", "be", "or"))


async def test_an_adapters_own_calls_are_routed_as_its_requests_are(aclient: AsyncClient, script: Script) -> None:
    for call in (aclient.load_adapter, aclient.get_adapter, aclient.unload_adapter):
        script.metadata = {}
        await call("support")
        assert script.metadata["x-adapter-id"] == "support"


async def test_an_adapters_life(aclient: AsyncClient) -> None:
    loaded = await aclient.load_adapter("support", pin=True)

    assert (loaded.id, loaded.state, loaded.pinned) == ("support", AdapterState.RESIDENT, True)
    assert await aclient.get_adapter("support") == loaded
    assert await aclient.list_adapters() == [loaded]
    assert await aclient.unload_adapter("support") == 1_500_000
    with pytest.raises(AdapterNotFound, match="no adapter 'support'"):
        await aclient.get_adapter("support")


async def test_get_model(aclient: AsyncClient) -> None:
    assert (await aclient.get_model()).default_max_new_tokens == 64


async def test_health_follows_the_server(server: ScriptedServer, aclient: AsyncClient) -> None:
    assert await aclient.is_healthy()

    server.set_serving(False)

    assert not await aclient.is_healthy()


async def test_wait_until_ready_returns_when_the_server_comes_up(server: ScriptedServer, aclient: AsyncClient) -> None:
    server.set_serving(False)
    threading.Timer(0.3, server.set_serving, [True]).start()

    await aclient.wait_until_ready(10)

    assert await aclient.is_healthy()


async def test_wait_until_ready_gives_up_in_time() -> None:
    began = time.monotonic()
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(ServerUnavailable, match=r"not ready within 0\.3 s"):
            await client.wait_until_ready(0.3)
    assert time.monotonic() - began < 3


async def test_the_timeout_ends_a_whole_stream(server: ScriptedServer) -> None:
    async with AsyncClient(server.target, timeout_seconds=0.3) as client:
        with pytest.raises(DeadlineExceeded, match="timeout_seconds"):
            async for _ in client.stream(ENDLESS):
                pass
    assert await _is_set(server.script.stream_was_cancelled)


async def test_aliases_and_changes(aclient: AsyncClient, script: Script) -> None:
    await aclient.load_adapter("support", tier=Tier.HOST)
    alias = await aclient.set_alias("live", "support")
    assert (alias.name, alias.adapter_id, alias.revision) == ("live", "support", REVISION)
    seen: list[AdapterChanges] = []
    with pytest.raises(CallCancelled, match="no more changes"):
        async for changes in aclient.watch_adapters():
            seen.append(changes)
    assert [item.is_snapshot for item in seen] == [True, False]
    assert seen[0].adapters[0].aliases == (alias,)
    assert await aclient.delete_alias("live") == alias
    await aclient.unload_adapter("support", running=UnloadPolicy.REFUSE)
    assert script.unload_request.running == adapters_pb2.UnloadAdapterRequest.RUNNING_REFUSE
