"""Four times what the server can do: it refuses the surplus at once, loses nothing it accepted, and recovers."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from reliability.process_memory import resident_bytes
from reliability.prompts import Question, make_questions
from reliability.sizes import size
from support.live_server import answer_tokens
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import ServerBusy
from quiver.aio import AsyncClient
from quiver_server.engine import scheduler

SECONDS = size(10, 60)
NAMES = ("", "attention-r4", "all-r2", "mlp-r8")
MAX_RUNNING, MAX_WAITING = 8, 16
OVERLOAD = 4
MEMORY_GROWTH = 8 * 2**20
RECOVERY_SECONDS = 5.0


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """Steps of 20 ms, as with a larger model: so the load generator is not what is measured."""
    settings = {name: LLAMA_ADAPTERS[name] for name in NAMES if name}
    options = ("--max-running", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING), "--max-adapter-share", "1")
    launcher = ("-m", "reliability.faulty_server", "slow")
    folder = tmp_path_factory.mktemp("overload")
    with running_server(folder, base, settings, *options, launcher=launcher) as bench:
        yield bench


@dataclass
class Load:
    """What came of all requests. latencies: seconds, of the accepted ones."""

    client: AsyncClient
    outcomes: Counter[str] = field(default_factory=Counter[str])
    latencies: list[float] = field(default_factory=list[float])

    async def ask(self, question: Question) -> None:
        """One request: answered exactly, or refused with a hint."""
        started = time.monotonic()
        try:
            answer = await self.client.generate(
                question.prompt, adapter=question.adapter_id, max_new_tokens=question.num_tokens
            )
        except ServerBusy as busy:
            assert busy.retry_after_seconds
            assert time.monotonic() - started < 2.0, "a refusal that took long"
            self.outcomes["refused"] += 1
            return
        self.latencies.append(time.monotonic() - started)
        self.outcomes["exact" if tuple(answer_tokens(answer)) == question.answer else "wrong"] += 1

    async def closed(self, questions: list[Question], seconds: float, num_workers: int) -> float:
        """As many at once as the server can run; returns the requests per second that it can do."""
        started = time.monotonic()

        async def work(first: int) -> None:
            place = first
            while time.monotonic() < started + seconds:
                await self.ask(questions[place % len(questions)])
                place += num_workers

        await asyncio.gather(*map(work, range(num_workers)))
        return len(self.latencies) / (time.monotonic() - started)

    async def open(self, questions: list[Question], seconds: float, rate: float) -> None:
        """So many in each second, whether the earlier ones are answered or not."""
        started, number = time.monotonic(), 0
        async with asyncio.TaskGroup() as tasks:
            while (now := time.monotonic() - started) < seconds:
                while number < now * rate:
                    tasks.create_task(self.ask(questions[number % len(questions)]))
                    number += 1
                await asyncio.sleep(0.005)


def p99(latencies: list[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.99)]


async def test_four_times_the_capacity(bench: ServerFixture) -> None:
    questions = [question for question in make_questions(bench, NAMES, 48) if question.num_tokens > 4]
    async with AsyncClient(bench.server.target, timeout_seconds=60) as client:
        calm = Load(client)
        capacity = await calm.closed(questions, 3.0, MAX_RUNNING)
        before = resident_bytes(bench.server.process.pid)
        storm = Load(client)
        await storm.open(questions, SECONDS, OVERLOAD * capacity)
        ended = time.monotonic()
        growth = resident_bytes(bench.server.process.pid) - before
        after = Load(client)
        while len(after.latencies) < 16 or p99(after.latencies[-16:]) > 1.5 * p99(calm.latencies):
            await after.closed(questions, 0.3, MAX_RUNNING)
            assert time.monotonic() - ended < RECOVERY_SECONDS
    print(
        f"capacity {capacity:.0f}/s; {sum(storm.outcomes.values())} requests in {SECONDS} s: {dict(storm.outcomes)}; "
        f"p99 {p99(calm.latencies):.2f} s calm, {p99(storm.latencies):.2f} s under load; "
        f"memory {growth / 2**20:+.1f} MiB; as before after {time.monotonic() - ended:.1f} s"
    )
    assert calm.outcomes.keys() == {"exact"}
    assert storm.outcomes.keys() == {"exact", "refused"}, storm.outcomes
    assert after.outcomes.keys() == {"exact"}
    assert storm.outcomes["refused"] > storm.outcomes["exact"], "the load was no overload"
    assert storm.outcomes["exact"] > 0.8 * capacity * SECONDS, "an overload must not cost throughput"
    # For the sake of other adapters' shares nobody is passed for longer than this; then it waits for a place, and runs.
    assert p99(storm.latencies) < scheduler.PATIENCE_SECONDS + 2 * p99(calm.latencies)
    assert growth < MEMORY_GROWTH
    assert bench.server.metric("quiver_running_sequences") == 0
