"""Servers on S3 (moto's, over a socket), on web servers, and on folders: what they share, keep and survive."""

import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.error_assertions import refusal
from support.live_server import LiveServer, answer_tokens
from support.stores import S3, s3_server, web_server
from support.tiny import hf_greedy, hf_lora

from quiver import AdapterNotFound, Client, InvalidRequest, ServerUnavailable
from quiver_peft.adapters.store.store import AdapterStore, publish

PROMPT = [9, 20, 31, 42, 53]
WEIGHTS = "adapter_model.safetensors"


class Adapters:
    """Folders of adapters made by Hugging Face PEFT, and what each answers."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._folder = folder
        self.tokens: dict[str, list[int]] = {}
        for seed, name in enumerate(("one", "two", "three")):
            self.tokens[name] = hf_greedy(hf_lora(base, folder / name, rank=2 + seed, seed=60 + seed), PROMPT, 8)
        assert len({tuple(tokens) for tokens in self.tokens.values()}) == 3

    def __getitem__(self, name: str) -> Path:
        return self._folder / name

    def check(self, client: Client, adapter: str, name: str) -> str:
        """An id, revision or alias answers as that folder does; returns the revision that answered."""
        answer = client.generate(PROMPT, adapter=adapter, max_new_tokens=8)
        assert answer.adapter is not None
        assert answer_tokens(answer) == self.tokens[name]
        return answer.adapter.revision


Start = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def adapters(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(llama_base, tmp_path_factory.mktemp("made"))


@pytest.fixture
def s3() -> Iterator[S3]:
    with s3_server() as s3:
        yield s3


@pytest.fixture
def start(llama_base: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers; those that still run at the end must drain. No secret may be in their logs."""
    servers: list[LiveServer] = []

    def start(place: Path | str, *options: str) -> LiveServer:
        servers.append(LiveServer(llama_base, place, tmp_path / f"log-{len(servers)}", *options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            assert server.stop() == 0, server.log.read_text()
        log = server.log.read_text()
        assert "Traceback" not in log, log
        assert "a-secret-that-is-in-no-log" not in log


@contextmanager
def killed(server: LiveServer) -> Generator[None]:
    """As by the kernel, without a word."""
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    yield


def test_two_servers_share_a_bucket(start: Start, s3: S3, adapters: Adapters, tmp_path: Path) -> None:
    """Both take up what is published, each keeps its own copies, and what is gone from the bucket is gone."""
    bucket = AdapterStore(s3.url)
    old = publish(adapters["one"], bucket, "support")
    s3.copy_in(adapters["three"], "copied")
    options = [("--adapters", s3.url, "--state", str(tmp_path / f"state-{i}")) for i in range(2)]
    (tmp_path / "local").mkdir()
    with ExitStack() as stack:
        clients = [stack.enter_context(start(tmp_path / "local", *option).client()) for option in options]
        for client in clients:
            assert {item.id: item.state for item in client.list_adapters()} == {
                "copied": "registered",
                "support": "registered",
            }
            assert adapters.check(client, "support", "one") == old
            adapters.check(client, "copied", "three")
            assert client.get_adapter("support").source == f"{s3.url}/support"
        new = publish(adapters["two"], bucket, "support")
        for client in clients:
            assert client.load_adapter("support").revision == new
            assert adapters.check(client, "support", "two") == new
            assert adapters.check(client, f"support@{old[:10]}", "one") == old
        publish(adapters["three"], bucket, "late")
        adapters.check(clients[0], "late", "three")
        for key in s3.list_keys():
            if key.startswith("copied/"):
                s3.client.delete_object(Bucket="models", Key=f"adapters/{key}")
        clients[0].unload_adapter("copied")
        refusal(lambda: clients[0].get_adapter("copied"), AdapterNotFound, "no adapter has the id 'copied'")
        assert [item.id for item in clients[0].list_adapters()] == ["late", "support"]


def test_a_restart_serves_the_same_registry_while_the_bucket_is_away(
    start: Start, s3: S3, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, a cached file damaged, started again; then without S3: all is there but what was never here."""
    bucket = AdapterStore(s3.url)
    old = publish(adapters["one"], bucket, "support")
    publish(adapters["three"], bucket, "pinned")
    publish(adapters["three"], bucket, "never-asked")
    s3.copy_in(adapters["two"], "team/v2")
    options = ("--state", str(tmp_path / "state"))
    server = start(s3.url, *options)
    with server.client() as client:
        client.set_alias("live", "support")
        client.load_adapter("pinned", pin=True)
        client.load_adapter("named", source=f"{s3.url}/team/v2")
        new = publish(adapters["two"], bucket, "support")
        client.load_adapter("support")
        assert client.set_alias("next", "support").revision == new
        adapters.check(client, "named", "two")
    cached = tmp_path / "state" / "cache" / "support" / old / WEIGHTS
    with killed(server):
        cached.write_bytes(cached.read_bytes()[:-8] + b"damaged!")
        again = start(s3.url, *options)
    with again.client() as client:
        listed = {item.id: item for item in client.list_adapters()}
        assert (listed["pinned"].state, listed["pinned"].pinned) == ("resident", True)
        assert [alias.name for alias in listed["support"].aliases] == ["live", "next"]
        assert adapters.check(client, "live", "one") == old
        assert adapters.check(client, "next", "two") == adapters.check(client, "support", "two") == new
        adapters.check(client, "named", "two")
        assert "is damaged" in again.log.read_text()
        assert cached.read_bytes() == (adapters["one"] / WEIGHTS).read_bytes(), "read again from the bucket"
        # Rolling back is moving it back.
        assert client.set_alias("next", "live").revision == old
        assert adapters.check(client, "next", "one") == old
    assert again.stop() == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    alone = start(s3.url, *options)
    with alone.client() as client:
        assert adapters.check(client, "live", "one") == adapters.check(client, "next", "one") == old
        assert adapters.check(client, "support", "two") == new, "what it was last"
        adapters.check(client, "pinned", "three")
        error = refusal(
            lambda: client.generate(PROMPT, adapter="never-asked"), ServerUnavailable, "the store does not answer"
        )
        assert error.reason == "STORE_UNAVAILABLE"
        refusal(lambda: client.load_adapter("support"), ServerUnavailable, "the store does not answer")
        assert client.generate(PROMPT, max_new_tokens=2).token_ids
        assert "is served as it was last" in alone.log.read_text()


def test_the_first_of_several_stores_wins_and_a_web_server_is_one(
    start: Start, adapters: Adapters, tmp_path: Path
) -> None:
    for name, folder in (("both", "local"), ("both", "www"), ("web", "www")):
        made = "one" if folder == "local" else "two"
        shutil.copytree(adapters[made], tmp_path / folder / name)
    with web_server(tmp_path / "www") as url:
        server = start(tmp_path / "local", "--adapters", url)
        with server.client() as client:
            assert {item.id: item.source for item in client.list_adapters()} == {
                "both": f"{tmp_path}/local/both",
                "web": f"{url}/web",
            }
            adapters.check(client, "both", "one")
            adapters.check(client, "web", "two")
            client.load_adapter("other", source=f"{url}/both")
            adapters.check(client, "other", "two")
            for source in (
                "http://127.0.0.1:9/x",
                f"{url}/../x",
                f"{url}x",
                f"{url}/",
                "s3://b/x",
                "a//b",
                f"{url}/%2e",
            ):
                refusal(
                    lambda source=source: client.load_adapter("x", source=source),
                    InvalidRequest,
                    f"source {source!r} is outside of what this server loads from",
                )
            refusal(lambda: client.generate(PROMPT, adapter="nobody"), AdapterNotFound, "no adapter has the id")
