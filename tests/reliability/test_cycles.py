"""Thousands of loads and unloads under traffic: memory comes back, and every answer is its revision's."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import pytest
from reliability.process_memory import num_open_files, num_threads, resident_bytes
from reliability.sizes import size
from support.live_server import answer_tokens
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server
from support.tiny import hf_greedy, hf_lora, random_prompts

from quiver import Client
from quiver_peft.files.atomic_folder import replace_folder

NUM_CYCLES = size(200, 2000)
NUM_WARM_UP = 60
NUM_CLIENTS = 3
GROWTH = 0.02
FILES = ("adapter_config.json", "adapter_model.safetensors")
PROMPTS = random_prompts([3, 16, 21], seed=7)
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4",)}
    options = ("--kv-memory-mib", "8", "--adapter-memory-mib", "4")  # so that 2 % of all is little
    with running_server(tmp_path_factory.mktemp("cycles"), base, settings, *options) as bench:
        yield bench


@pytest.fixture(scope="module")
def contents(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, bytes], list[list[int]]]]:
    """Three revisions of one adapter, of different sizes: their files, and their answers to the prompts."""
    folder = tmp_path_factory.mktemp("contents")
    made: list[tuple[dict[str, bytes], list[list[int]]]] = []
    for rank in (2, 8, 16):
        oracle = hf_lora(base, folder / str(rank), rank=rank, targets="all-linear", seed=rank)
        files = {name: (folder / str(rank) / name).read_bytes() for name in FILES}
        made.append((files, [hf_greedy(oracle, prompt, NUM_TOKENS) for prompt in PROMPTS]))
    return made


class Traffic:
    """Clients that ask for the cycling adapter all the time, and sort the answers by their revision."""

    def __init__(self, bench: ServerFixture) -> None:
        self.seen: dict[str, set[tuple[int, tuple[int, ...]]]] = {}
        self.num_answers = Counter[str]()
        self._bench = bench
        self._done = threading.Event()

    def ask(self, first: int) -> None:
        """Until told to end."""
        with self._bench.server.client() as client:
            for place in cycle([*range(first, len(PROMPTS)), *range(first)]):
                if self._done.is_set():
                    return
                answer = client.generate(PROMPTS[place], adapter="cycling", max_new_tokens=NUM_TOKENS)
                assert answer.adapter is not None
                revision = answer.adapter.revision
                self.seen.setdefault(revision, set()).add((place, tuple(answer_tokens(answer))))
                self.num_answers[revision] += 1

    def end(self) -> None:
        self._done.set()


def test_memory_returns_and_every_answer_is_exact_for_its_revision(
    bench: ServerFixture, contents: list[tuple[dict[str, bytes], list[list[int]]]]
) -> None:
    folder, pid = bench.adapters / "cycling", bench.server.process.pid
    replace_folder(folder, contents[0][0])
    answers: dict[str, list[list[int]]] = {}
    traffic = Traffic(bench)

    def turn(client: Client, number: int) -> None:
        files, expected = contents[number % len(contents)]
        replace_folder(folder, files)
        answers[client.load_adapter("cycling").revision] = expected
        if number % 2:
            client.unload_adapter("cycling")

    with bench.server.client() as client, ThreadPoolExecutor(NUM_CLIENTS) as threads:
        free = bench.server.metric("quiver_adapter_free_bytes")
        clients = [threads.submit(traffic.ask, first) for first in range(NUM_CLIENTS)]
        try:
            for number in range(NUM_WARM_UP):
                turn(client, number)
            before = resident_bytes(pid), num_threads(pid), num_open_files(pid)
            for number in range(NUM_CYCLES):
                turn(client, number)
            after = resident_bytes(pid), num_threads(pid), num_open_files(pid)
        finally:
            traffic.end()
        for future in clients:
            future.result(30)
        client.unload_adapter("cycling")
        assert bench.server.metric("quiver_adapter_free_bytes") == free
        bench.check(client, "attention-r4")
    growth = (after[0] - before[0]) / before[0]
    print(
        f"{NUM_CYCLES} cycles, {sum(traffic.num_answers.values())} answers of {len(answers)} revisions; memory "
        f"{before[0] / 2**20:.1f} MiB {100 * growth:+.2f} %, threads {after[1] - before[1]:+d}, "
        f"files {after[2] - before[2]:+d}"
    )
    assert len(answers) == len(contents)
    assert set(traffic.seen) <= set(answers)
    for revision, seen in traffic.seen.items():
        for place, tokens in seen:
            assert list(tokens) == answers[revision][place], f"revision {revision[:12]}"
    assert min(traffic.num_answers[revision] for revision in answers) >= 5, "each revision was asked for"
    assert growth < GROWTH
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 2
