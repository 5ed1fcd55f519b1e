"""What a full server does: it refuses with a hint, and forgets whoever stopped waiting."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.error_assertions import has_room_again, refusal
from support.live_server import LiveServer, eventually
from support.server_fixture import ENDURING

from quiver import Client, DeadlineExceeded, ServerBusy


@pytest.fixture(scope="module")
def narrow(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that runs one sequence at a time, lets three wait, and nobody for longer than a second."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "adapters").mkdir()
    options = ("--max-running", "1", "--max-waiting", "3", "--max-queue-seconds", "1", "--max-adapter-share", "1")
    server = LiveServer(enduring_base, folder / "adapters", folder / "log", *options)
    yield server
    assert server.stop() == 0, server.log.read_text()


def test_who_waits_too_long_is_refused_with_a_hint(narrow: LiveServer) -> None:
    with narrow.client() as client, narrow.client() as other:
        stream = client.stream([5, 6, 7], **{**ENDURING, "n": 4, "temperature": 1.0, "seed": 1})
        next(stream)
        error = refusal(lambda: other.generate([5], max_new_tokens=1), ServerBusy, "all this server holds")
        assert isinstance(error, ServerBusy) and error.retry_after_seconds
        stream.close()
        has_room_again(lambda: other.generate([5], max_new_tokens=1))
        stream = client.stream([5, 6, 7], **{**ENDURING, "n": 3, "temperature": 1.0, "seed": 1})
        next(stream)
        error = refusal(lambda: other.generate([5], max_new_tokens=1), ServerBusy, "waited 1 s without starting")
        assert isinstance(error, ServerBusy) and error.retry_after_seconds
        eventually(lambda: narrow.metric("quiver_waiting_sequences") <= 2)  # it left the queue
        stream.close()
        eventually(lambda: narrow.metric("quiver_kv_usage_ratio") == 0)
        assert len(other.generate([5, 6, 7], max_new_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_deadline_that_passes_in_the_queue_costs_nothing(narrow: LiveServer) -> None:
    with narrow.client() as client, Client(narrow.target, timeout_seconds=0.05) as hurried:
        stream = client.stream([5, 6, 7], max_new_tokens=240, ignore_eos=True, n=2, temperature=1.0, seed=1)
        next(stream)
        refusal(lambda: hurried.generate([5, 6, 7], max_new_tokens=200), DeadlineExceeded, "did not answer within")
        eventually(lambda: narrow.metric("quiver_waiting_sequences") <= 1)
        before = narrow.metric("quiver_generated_tokens_total", adapter="")
        stream.close()
        eventually(lambda: narrow.metric("quiver_running_sequences") == 0)
        after = narrow.metric("quiver_generated_tokens_total", adapter="")
    assert after - before <= 2 * 240, "only the stream's own tokens"
