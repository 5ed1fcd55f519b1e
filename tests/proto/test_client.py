"""The blocking client against a real server on a real socket."""

import inspect
import itertools
import threading
import time

import grpc
import pytest
from support.scripted_server import ENDLESS, FAIL_HALFWAY, REVISION, Script, ScriptedServer

from quiver import AdapterState, AsyncClient, Client, DeadlineExceeded, FinishReason, InvalidRequest, Tier, UnloadPolicy
from quiver.errors import AdapterNotFound, CallCancelled, ServerInternal, ServerUnavailable
from quiver.results import AdapterRef, Timing, Usage
from quiver.v1 import adapters_pb2


def test_generate_answers_with_everything_the_server_said(client: Client) -> None:
    answer = client.generate("hello", adapter="support", max_new_tokens=3, request_id="r-1")

    assert answer.text == "one two three"
    assert answer.token_ids == (7, 8, 0)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.usage == Usage(prompt_tokens=5, generated_tokens=3, cached_tokens=2, virtual_tokens=20)
    assert answer.adapter == AdapterRef(id="support", revision=REVISION, methods=("lora",))
    assert answer.request_id == "r-1"
    assert answer.timing == Timing(queue_seconds=0.25, time_to_first_token_seconds=0.5, total_seconds=0.75)


def test_the_base_alone_is_no_adapter(client: Client) -> None:
    assert client.generate("hello").adapter is None


def test_several_candidates_come_in_order(client: Client) -> None:
    answer = client.generate("hello", n=3, temperature=1.0)

    assert [candidate.index for candidate in answer.candidates] == [0, 1, 2]
    assert answer.token_ids == answer.candidates[0].token_ids


def test_a_prompt_of_token_ids_reaches_the_server_as_ids(client: Client, script: Script) -> None:
    client.generate([5, 6, 7])

    assert script.generate_request.WhichOneof("prompt") == "tokens"
    assert list(script.generate_request.tokens.ids) == [5, 6, 7]


@pytest.mark.parametrize("streaming", [False, True])
def test_requests_for_an_adapter_carry_its_id_for_proxies(client: Client, script: Script, streaming: bool) -> None:
    if streaming:
        list(client.stream("hello", adapter="support"))
    else:
        client.generate("hello", adapter="support")

    assert script.metadata["x-adapter-id"] == "support"


def test_requests_for_the_base_carry_no_adapter_id(client: Client, script: Script) -> None:
    client.generate("hello")

    assert "x-adapter-id" not in script.metadata


def test_an_adapter_id_that_metadata_cannot_carry_still_reaches_the_server(client: Client, script: Script) -> None:
    client.generate("hello", adapter="Ünterstützung")

    assert script.generate_request.adapter_id == "Ünterstützung"
    assert "x-adapter-id" not in script.metadata


def test_score_answers_for_each_continuation(client: Client, script: Script) -> None:
    scoring = client.score("hello", [" you", [7, 8]], adapter="support", top_logprobs=3, request_id="r-3")

    assert [(score.total_logprob, score.is_greedy) for score in scoring.scores] == [(-0.5, True), (-1.5, False)]
    assert [score.logprobs[0].token_id for score in scoring.scores] == [7, 7]
    assert (scoring.adapter, scoring.request_id) == (AdapterRef("support", REVISION, ()), "r-3")
    sent = script.score_request
    assert (sent.text, sent.top_logprobs, sent.continuations[0].text) == ("hello", 3, " you")
    assert list(sent.continuations[1].tokens.ids) == [7, 8]
    assert script.metadata["x-adapter-id"] == "support"


def test_a_stream_comes_piece_by_piece(client: Client) -> None:
    first, last = client.stream("hello", adapter="support", request_id="r-2")

    assert (first.text, first.token_ids) == ("first", (1,))
    assert first.adapter == AdapterRef(id="support", revision=REVISION, methods=("lora",))
    assert first.request_id == "r-2"
    assert (first.finish_reason, first.usage, first.timing) == (None, None, None)
    assert last.finish_reason is FinishReason.EOS
    assert last.usage is not None and last.usage.generated_tokens == 3
    assert last.timing is not None and last.timing.total_seconds == 0.75
    assert last.adapter is None


def test_leaving_a_stream_early_cancels_the_call(client: Client, script: Script) -> None:
    for piece in client.stream(ENDLESS):
        assert piece.text == "first"
        break

    assert script.stream_was_cancelled.wait(5)


def test_closing_a_held_stream_cancels_the_call(client: Client, script: Script) -> None:
    pieces = client.stream(ENDLESS)
    next(pieces)
    assert not script.stream_was_cancelled.wait(0.1)

    pieces.close()

    assert script.stream_was_cancelled.wait(5)


def test_a_stream_that_fails_halfway_gives_what_came_and_then_the_error(client: Client) -> None:
    pieces = client.stream(FAIL_HALFWAY)

    assert next(pieces).text == "first"
    with pytest.raises(ServerInternal, match="the engine stopped"):
        next(pieces)


def test_a_stream_with_a_wrong_option_fails_before_its_first_piece(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="top_k is -1"):
        client.stream("hello", top_k=-1)


def test_tokenize(client: Client) -> None:
    assert client.tokenize("to be or").token_ids == (2, 2, 2)
    assert client.tokenize("to be or").pieces == ()
    assert client.tokenize("to be or", pieces=True).pieces == ("to", "be", "or")


def test_an_adapters_own_calls_are_routed_as_its_requests_are(client: Client, script: Script) -> None:
    for call in (client.load_adapter, client.get_adapter, client.unload_adapter):
        script.metadata = {}
        call("support")
        assert script.metadata["x-adapter-id"] == "support"


def test_an_adapters_life(client: Client, script: Script) -> None:
    assert client.list_adapters() == []

    loaded = client.load_adapter("support", source="file:///adapters/support", pin=True)

    assert script.load_request.source == "file:///adapters/support"
    assert (loaded.id, loaded.state, loaded.pinned) == ("support", AdapterState.RESIDENT, True)
    assert client.get_adapter("support") == loaded
    assert client.list_adapters() == [loaded]
    assert client.unload_adapter("support") == 1_500_000
    with pytest.raises(AdapterNotFound, match="no adapter 'support'"):
        client.get_adapter("support")


def test_get_model(client: Client) -> None:
    model = client.get_model()

    assert (model.name, model.context_length, model.adapter_methods) == ("demo", 512, ("lora",))


def test_health_follows_the_server(server: ScriptedServer, client: Client) -> None:
    assert client.is_healthy()

    server.set_serving(False)

    assert not client.is_healthy()


def test_health_is_false_where_nothing_listens() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.is_healthy()


def test_wait_until_ready_returns_when_the_server_comes_up() -> None:
    server = ScriptedServer()
    server.set_serving(False)
    with server, Client(server.target) as client:
        threading.Timer(0.3, server.set_serving, [True]).start()
        client.wait_until_ready(10)

        assert client.is_healthy()


def test_wait_until_ready_gives_up_in_time() -> None:
    began = time.monotonic()
    with Client("127.0.0.1:1") as client, pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1 .*0\.3 s"):
        client.wait_until_ready(0.3)
    assert time.monotonic() - began < 3


def test_the_timeout_ends_a_call_and_a_whole_stream(server: ScriptedServer) -> None:
    with Client(server.target, timeout_seconds=0.3) as client:
        with pytest.raises(DeadlineExceeded, match="timeout_seconds"):
            list(client.stream(ENDLESS))
        assert server.script.stream_was_cancelled.wait(5)


def test_answers_beyond_grpcs_own_4_mib_arrive(client: Client, script: Script) -> None:
    script.text = "x" * (8 * 2**20)

    assert len(client.generate("hello").text) == 8 * 2**20


def test_an_answer_beyond_the_bound_is_refused_and_not_called_a_full_queue(client: Client, script: Script) -> None:
    script.text = "x" * (64 * 2**20)

    with pytest.raises(InvalidRequest, match="too large") as caught:
        client.generate("hello")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_threads_share_a_client(client: Client) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == ["one two three"] * 8


def _public_methods(client_class: type[Client] | type[AsyncClient]) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in inspect.getmembers(client_class, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    assert _public_methods(Client) == _public_methods(AsyncClient)


def test_aliases_and_changes(client: Client, script: Script) -> None:
    client.load_adapter("support", tier=Tier.HOST)
    assert script.load_request.tier == adapters_pb2.LoadAdapterRequest.TIER_HOST
    alias = client.set_alias("live", "support")
    assert (alias.name, alias.adapter_id, alias.revision) == ("live", "support", REVISION)
    assert client.get_adapter("support").aliases == (alias,)
    first, second = itertools.islice(client.watch_adapters(), 2)
    assert (first.is_snapshot, [item.id for item in first.adapters], first.removed_ids) == (True, ["support"], ())
    assert (second.is_snapshot, second.adapters, second.removed_ids) == (False, (), ("old",))
    with pytest.raises(CallCancelled, match="no more changes"):
        list(client.watch_adapters())
    assert client.delete_alias("live") == alias
    client.unload_adapter("support", running=UnloadPolicy.CANCEL)
    assert script.unload_request.running == adapters_pb2.UnloadAdapterRequest.RUNNING_CANCEL
