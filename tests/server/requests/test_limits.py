"""The server's own bounds, as options: what is longer or larger is refused; a flood leaves others their places."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.error_assertions import has_room_again, refusal
from support.live_server import run_refused
from support.server_fixture import ENDURING, LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import Client, InvalidRequest, ServerBusy
from quiver_server.errors import BusyError, InvalidRequestError
from quiver_server.requests.admission import Admission

OPTIONS = {
    "--max-prompt-tokens": "20",
    "--max-new-tokens": "8000",
    "--default-max-new-tokens": "7",
    "--max-message-mib": "1",
    "--max-running": "2",
    "--max-waiting": "6",
}


@pytest.fixture(scope="module")
def bounded(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server with tight bounds."""
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2")}
    options = [part for option in OPTIONS.items() for part in option]
    with running_server(tmp_path_factory.mktemp("bounded"), enduring_base, settings, *options) as bench:
        yield bench


@pytest.fixture
def client(bounded: ServerFixture) -> Iterator[Client]:
    with bounded.server.client() as client:
        yield client
        bounded.check(client, "all-r2")


def test_a_prompt_longer_than_the_bound(client: Client) -> None:
    assert client.generate([7] * 20, max_new_tokens=1).token_ids
    words = "the prompt has 21 tokens; this server takes 20 at most (--max-prompt-tokens)"
    for call in (lambda: client.generate([7] * 21), lambda: client.score([7] * 21, [[5]])):
        assert refusal(call, InvalidRequest, words).reason == "INVALID_REQUEST"
    assert len(client.score([7] * 20, [[5] * 30]).scores[0].logprobs) == 30, "a continuation is no prompt"


def test_an_answer_longer_than_the_bound(client: Client) -> None:
    stream = client.stream([7], **ENDURING)
    assert next(stream).token_ids
    stream.close()
    words = "stopping.max_new_tokens is 8001; it must be at most 8000 (--max-new-tokens)"
    refusal(lambda: client.generate([7], max_new_tokens=8001), InvalidRequest, words)
    assert len(client.generate([7], ignore_eos=True).token_ids) == 7


def test_a_message_larger_than_the_bound(client: Client) -> None:
    words = r"Received message larger than max (3000007 vs. 1048576)"
    refusal(lambda: client.tokenize("ä" * 1_500_000), InvalidRequest, "Received message larger than max")
    error = refusal(lambda: client.tokenize("x" * 3_000_002), InvalidRequest, words)
    assert "the request or its answer is too large" in str(error)


def test_a_flood_for_one_adapter_leaves_others_their_places(bounded: ServerFixture, client: Client) -> None:
    """Eight places; the base may take four. It stays so when requests name a revision, and ends with the flood."""
    revision = client.load_adapter("attention-r4").revision
    for name in ("", "attention-r4"):
        who = f"adapter '{name}'" if name else "the base"
        flood = client.stream([5, 6], **{**ENDURING, "adapter": name, "n": 4, "temperature": 1.0, "seed": 1})
        next(flood)
        for again in {name, f"{name}@{revision}" if name else ""}:
            words = f"{who} has 4 sequences running or waiting and is asked for 1 more; its share of this server is 4"
            error = refusal(lambda again=again: client.generate([5], adapter=again), ServerBusy, words)
            assert isinstance(error, ServerBusy) and error.retry_after_seconds
        bounded.check(client, "all-r2")
        flood.close()
        has_room_again(lambda name=name: client.generate([5], adapter=name, max_new_tokens=1))
        bounded.check(client, name)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_admission_counts_what_is_inside(share: float) -> None:
    """Whatever the share, an adapter has one place; and all together never more than there are."""
    admission = Admission(6, share)
    most = {0.0: 1, 0.5: 3, 1.0: 6}[share]
    admission.check("a", most)
    with pytest.raises(InvalidRequestError, match=f"asks for {most + 1} sequences at once; this server holds {most}"):
        admission.check("a", most + 1)
    admission.acquire("a", 1)
    with pytest.raises(BusyError):
        admission.check("a", most)
    admission.release("a", 1)
    for i in range(6):
        admission.acquire(str(i), 1)
    with pytest.raises(BusyError, match="6 sequences are running or waiting, which is all this server holds"):
        admission.check("b", 1)
    admission.release("0", 1)
    admission.check("b", 1)


def test_a_default_that_nobody_may_ask_for(llama_base: Path, tmp_path: Path) -> None:
    options = ("--base", str(llama_base), "--adapters", str(tmp_path), "--max-new-tokens", "100")
    code, log = run_refused(tmp_path / "log", *options)
    assert (code, "--default-max-new-tokens 128: must be at most --max-new-tokens 100" in log) == (2, True), log
