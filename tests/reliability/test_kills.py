"""kill -9 at random moments: nothing half-written is ever served, and a new process serves what the old one did."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reliability.sizes import size
from support.live_server import LiveServer, answer_tokens
from support.tiny import hf_greedy, hf_lora

from quiver import Client, QuiverClientError
from quiver_peft import GPT
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.files.atomic_folder import replace_folder

NUM_SAVES = size(30, 200)
NUM_SERVERS = size(3, 50)
PROMPT = [9, 20, 31, 42]
NUM_TOKENS = 6


def test_killed_while_saving(base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reliability.saver", str(base), str(tmp_path / "adapter"), str(NUM_SAVES), "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


class Contents:
    """Two contents of one adapter's files, and what each answers."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.files: list[dict[str, bytes]] = []
        self.revisions: list[str] = []
        self.answers: list[list[int]] = []
        model = GPT.from_pretrained(base)
        for rank in (4, 32):
            oracle = hf_lora(base, folder / str(rank), rank=rank, targets="all-linear", seed=rank)
            self.files.append({path.name: path.read_bytes() for path in (folder / str(rank)).iterdir()})
            self.revisions.append(read_adapter(folder / str(rank), model.base).revision)
            self.answers.append(hf_greedy(oracle, PROMPT, NUM_TOKENS))

    def check(self, client: Client, name: str, *revisions: str) -> None:
        """One of these revisions answers, any of both if none is given, and as Hugging Face does."""
        answer = client.generate(PROMPT, adapter=name, max_new_tokens=NUM_TOKENS)
        assert answer.adapter is not None and answer.adapter.revision in (revisions or self.revisions)
        assert answer_tokens(answer) == self.answers[self.revisions.index(answer.adapter.revision)]


def until_killed(work: Callable[[Client, int], object], server: LiveServer) -> threading.Thread:
    """Do it again and again, as long as there is a server."""

    def repeat() -> None:
        with server.client() as client:
            for number in range(1_000_000):
                try:
                    work(client, number)
                except QuiverClientError:
                    if server.process.poll() is not None:
                        return

    thread = threading.Thread(target=repeat)
    thread.start()
    return thread


class Administrator:
    """Loads, names and unloads an adapter whose folder it replaces. named: what its alias may name now."""

    def __init__(self, contents: Contents, adapters: Path) -> None:
        self._contents = contents
        self._adapters = adapters
        self.named: list[str] = []

    def begin(self, client: Client) -> None:
        """What every later server must know of."""
        client.load_adapter("steady", pin=True)
        client.load_adapter("registered", source="steady")
        self.act(client, 0)

    def act(self, client: Client, number: int) -> None:
        """Once. Killed in between, the alias names what it named before or what it was to name."""
        replace_folder(self._adapters / "loading", self._contents.files[number % 2])
        revision = client.load_adapter("loading").revision
        assert revision == self._contents.revisions[number % 2]
        self.named.append(revision)
        assert client.set_alias("live", f"loading@{revision}").revision == revision
        self.named = [revision]
        if number % 3 == 0:
            client.unload_adapter("loading")

    def check(self, client: Client) -> None:
        """A server knows what the one before it knew, and answers with it."""
        known = {adapter.id: adapter for adapter in client.list_adapters()}
        assert (sorted(known), known["steady"].pinned) == (["loading", "registered", "steady"], True)
        ((alias,),) = [adapter.aliases for adapter in known.values() if adapter.aliases]
        assert (alias.name, alias.revision in self.named) == ("live", True)
        self._contents.check(client, "live", alias.revision)
        for name in ("steady", "registered"):
            self._contents.check(client, name, self._contents.revisions[0])
        self.named = [alias.revision]


@pytest.mark.timeout(60 + 30 * NUM_SERVERS)
def test_servers_killed_while_loading(base: Path, tmp_path: Path) -> None:
    """The folder is replaced, loaded, named, unloaded and asked when the process is killed; the next one goes on."""
    draw = random.Random(3)
    contents = Contents(base, tmp_path / "contents")
    adapters = tmp_path / "adapters"
    for name in ("steady", "loading"):
        replace_folder(adapters / name, contents.files[0])
    administrator = Administrator(contents, adapters)
    for number in range(NUM_SERVERS):
        server = LiveServer(base, adapters, tmp_path / f"log-{number}", "--state", str(tmp_path / "state"))
        with server.client() as client:
            if not number:
                administrator.begin(client)
            administrator.check(client)
            contents.check(client, "loading")
        threads = [
            until_killed(administrator.act, server),
            until_killed(lambda client, _: contents.check(client, "loading"), server),
            until_killed(lambda client, _: contents.check(client, "live"), server),
        ]
        time.sleep(draw.uniform(0.0, 0.7))
        server.process.kill()
        server.process.wait()
        for thread in threads:
            thread.join(60)
        assert "Traceback" not in server.log.read_text()
