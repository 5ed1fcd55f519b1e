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
from server.live_server import LiveServer, answer_tokens
from tiny import hf_greedy, hf_lora

from quiver import Client, QuiverClientError
from quiver_peft.adapters.folders import replace_folder

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
        self.answers: list[list[int]] = []
        for rank in (4, 32):
            oracle = hf_lora(base, folder / str(rank), rank=rank, targets="all-linear", seed=rank)
            self.files.append({path.name: path.read_bytes() for path in (folder / str(rank)).iterdir()})
            self.answers.append(hf_greedy(oracle, PROMPT, NUM_TOKENS))


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


@pytest.mark.timeout(60 + 30 * NUM_SERVERS)
def test_servers_killed_while_loading(base: Path, tmp_path: Path) -> None:
    """The folder is replaced, loaded, unloaded and asked for when the process is killed; the next one goes on."""
    draw = random.Random(3)
    contents = Contents(base, tmp_path / "contents")
    adapters = tmp_path / "adapters"
    for name in ("steady", "loading"):
        replace_folder(adapters / name, contents.files[0])

    def load(client: Client, number: int) -> None:
        replace_folder(adapters / "loading", contents.files[number % 2])
        client.load_adapter("loading")
        if number % 3 == 0:
            client.unload_adapter("loading")

    def ask(client: Client, number: int) -> None:
        answer = client.generate(PROMPT, adapter="loading", max_new_tokens=NUM_TOKENS)
        assert answer_tokens(answer) in contents.answers

    for number in range(NUM_SERVERS):
        server = LiveServer(base, adapters, tmp_path / f"log-{number}")
        with server.client() as client:
            assert [adapter.id for adapter in client.list_adapters()] == ["loading", "steady"]
            answer = client.generate(PROMPT, adapter="steady", max_new_tokens=NUM_TOKENS)
            assert answer_tokens(answer) == contents.answers[0]
            ask(client, 0)
        threads = [until_killed(load, server), until_killed(ask, server)]
        time.sleep(draw.uniform(0.0, 0.7))
        server.process.kill()
        server.process.wait()
        for thread in threads:
            thread.join(60)
        assert "Traceback" not in server.log.read_text()
