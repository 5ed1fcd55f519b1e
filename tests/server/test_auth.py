"""Tokens over real calls: who may ask what, how much at once, and a file that changes while the server runs."""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.error_assertions import refusal
from support.live_server import eventually
from support.server_fixture import ENDURING, LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import Client, InvalidRequest, QuiverClientError, ServerBusy
from quiver.errors import AccessDenied
from quiver_peft.errors import QuiverError
from quiver_server.auth import ANONYMOUS, Authenticator, read_grants

ADMIN, SUPPORT, SLOW, NARROW = (f"{name}-token-{'x' * 16}" for name in ("admin", "support", "slow", "narrow"))
FILE = f"""
[[token]]
name = "operations"
sha256 = "{hashlib.sha256(ADMIN.encode()).hexdigest()}"
role = "admin"

[[token]]
name = "support"
token = "{SUPPORT}"
adapters = ["attention-*", "all-r2"]
base = false

[[token]]
name = "slow"
token = "{SLOW}"
requests_per_second = 0.5

[[token]]
name = "narrow"
token = "{NARROW}"
max_concurrent = 2
"""


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("access") / "tokens.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def guarded(enduring_base: Path, token_file: Path) -> Iterator[ServerFixture]:
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2", "mlp-r8")}
    with running_server(token_file.parent, enduring_base, settings, "--token-file", str(token_file)) as bench:
        yield bench
        log = bench.server.log.read_text()
        assert not [token for token in (ADMIN, SUPPORT, SLOW, NARROW) if token in log], "a secret in the log"


CALLS: list[Callable[[Client], object]] = [
    lambda client: client.generate([5, 6], max_new_tokens=1),
    lambda client: list(client.stream([5, 6], max_new_tokens=1)),
    lambda client: client.score([5, 6], [[7]]),
    lambda client: client.tokenize("hello"),
    lambda client: client.list_adapters(),
    lambda client: client.get_adapter("all-r2"),
    lambda client: client.load_adapter("all-r2"),
    lambda client: client.unload_adapter("all-r2"),
    lambda client: client.get_model(),
]


@pytest.mark.parametrize("token", ["", "nobody's", SUPPORT[:-1], SUPPORT + "x"])
def test_no_call_without_a_token(guarded: ServerFixture, token: str) -> None:
    with guarded.server.client(token) as client:
        for call in CALLS:
            error = refusal(lambda call=call: call(client), AccessDenied, "authorization: Bearer TOKEN")
            assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            assert not token or token not in str(error)
        assert client.is_healthy(), "health is open: kubelet has no token"


def test_another_scheme_is_no_token(guarded: ServerFixture) -> None:
    with grpc.insecure_channel(guarded.server.target) as channel:
        method = channel.unary_unary("/quiver.v1.ModelService/GetModel")
        for value in (f"Basic {SUPPORT}", SUPPORT, "Bearer"):
            with pytest.raises(grpc.RpcError) as caught:
                method(b"", metadata=(("authorization", value),), timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert method(b"", metadata=(("authorization", f"bearer {SUPPORT}"),), timeout=20)


def test_an_admin_may_do_everything(guarded: ServerFixture) -> None:
    with guarded.server.client(ADMIN) as client:
        for call in CALLS:
            call(client)
        guarded.check(client, "mlp-r8")


def test_only_admins_change_adapters(guarded: ServerFixture) -> None:
    with guarded.server.client(SUPPORT) as client:
        for change in (client.load_adapter, client.unload_adapter):
            error = refusal(lambda change=change: change("all-r2"), AccessDenied, "a token of the role admin")
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")


def test_a_token_reaches_its_adapters_only(guarded: ServerFixture) -> None:
    with guarded.server.client(SUPPORT) as client:
        for name in ("attention-r4", "all-r2"):
            guarded.check(client, name)
        assert [adapter.id for adapter in client.list_adapters()] == ["all-r2", "attention-r4"]
        for name in ("mlp-r8", "nobody", "mlp-r8@abcdef", "ALL-R2"):
            words = f"this token does not allow the adapter {name!r}"
            refusal(lambda name=name: client.generate("hello", adapter=name), AccessDenied, words)
            refusal(lambda name=name: list(client.stream("hello", adapter=name)), AccessDenied, words)
            refusal(lambda name=name: client.score("hello", ["x"], adapter=name), AccessDenied, words)
            refusal(lambda name=name: client.get_adapter(name), AccessDenied, words)
        refusal(lambda: client.generate("hello"), AccessDenied, "does not allow the base without an adapter")
        refusal(lambda: client.get_adapter(""), InvalidRequest, "malformed")


def test_a_rate_is_kept_with_a_hint_that_holds(guarded: ServerFixture) -> None:
    with guarded.server.client(SLOW) as client:
        client.generate([5], max_new_tokens=1)
        error = refusal(lambda: client.generate([5], max_new_tokens=1), ServerBusy, "limit is 0.5 requests per second")
        assert isinstance(error, ServerBusy)
        assert error.retry_after_seconds is not None and 0 < error.retry_after_seconds <= 2
        time.sleep(error.retry_after_seconds)
        client.generate([5], max_new_tokens=1)
    with guarded.server.client(ADMIN) as other:
        for _ in range(5):
            other.generate([5], max_new_tokens=1)


def test_sequences_at_once_are_limited_and_counted_back(guarded: ServerFixture) -> None:
    words = "its limit is 2"
    with guarded.server.client(NARROW) as client:
        refusal(lambda: client.generate([5], n=3, temperature=1.0), ServerBusy, words)
        streams = [client.stream([5], **ENDURING) for _ in range(2)]
        for stream in streams:
            next(stream)
        refusal(lambda: client.generate([5], max_new_tokens=1), ServerBusy, words)
        with guarded.server.client(ADMIN) as other:
            other.generate([5], max_new_tokens=1)
        streams[0].close()
        streams[1].close()
        eventually(lambda: len(client_generate(client)) == 1, seconds=5)


def client_generate(client: Client) -> tuple[int, ...]:
    try:
        return client.generate([5], max_new_tokens=1).token_ids
    except ServerBusy:
        return ()


def test_a_changed_file_counts_and_a_broken_one_does_not(guarded: ServerFixture, token_file: Path) -> None:
    fresh = "fresh-token-" + "x" * 16

    def allowed(token: str) -> bool:
        with guarded.server.client(token) as client:
            try:
                client.get_model()
            except QuiverClientError:
                return False
        return True

    token_file.write_text(FILE + f'[[token]]\nname = "fresh"\ntoken = "{fresh}"\n')
    eventually(lambda: allowed(fresh))
    token_file.write_text("[[token]]\nname = 3")
    eventually(lambda: "the tokens stay as they were" in guarded.server.log.read_text() or not allowed(fresh))
    assert allowed(fresh) and allowed(ADMIN)
    token_file.write_text(FILE)
    eventually(lambda: not allowed(fresh))
    assert allowed(ADMIN)


BROKEN: list[tuple[str, str]] = [
    ("[[token]", "not valid TOML"),
    ("", r"must hold \[\[token\]\] tables"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\n[other]\n", r"must hold \[\[token\]\] tables"),
    ("[[token]]\ntoken='0123456789abcdef'\n", "token 1: name must be a text"),
    ("[[token]]\nname='a'\n", "token 1: give either token or sha256"),
    ("[[token]]\nname='a'\ntoken='short'\n", "16 or more characters"),
    ("[[token]]\nname='a'\nsha256='zz'\n", "64 hexadecimal digits"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nrole='root'\n", "role must be user or admin"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nadapter=['x']\n", "unknown key adapter; the keys are adapters"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nadapters='x'\n", "adapters must be a list"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nbase='no'\n", "base must be true or false"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nrequests_per_second=0\n", "requests_per_second must be above 0"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\nmax_concurrent=true\n", "max_concurrent must be 1 or more"),
    ("[[token]]\nname='a'\ntoken='0123456789abcdef'\n" * 2, "two tokens have the same name"),
    (
        "[[token]]\nname='a'\ntoken='0123456789abcdef'\n[[token]]\nname='b'\ntoken='0123456789abcdef'\n",
        "two tokens have the same sha256",
    ),
]


@pytest.mark.parametrize(("text", "words"), BROKEN, ids=[words[:30] for _, words in BROKEN])
def test_a_file_that_breaks_a_rule_is_refused_without_quoting_a_token(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(QuiverError, match=words) as caught:
        read_grants(path)
    assert "0123456789abcdef" not in str(caught.value)


def test_without_a_file_everybody_may_do_everything() -> None:
    Authenticator(None).authenticate("")
    ANONYMOUS.check_admin()
    ANONYMOUS.check_adapter("any")
    ANONYMOUS.check_adapter("")


def test_many_at_once_never_pass_the_limit(guarded: ServerFixture) -> None:
    """Counted in one event loop: no moment between looking and taking."""
    with guarded.server.client(NARROW) as client, ThreadPoolExecutor(12) as threads:

        def ask(_: Any) -> bool:
            return client_generate(client) != ()

        done = list(threads.map(ask, range(36)))
    assert any(done)
    eventually(lambda: guarded.server.metric("quiver_running_sequences") == 0)
