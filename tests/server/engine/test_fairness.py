"""Adapters share the engine: floods, long answers, long prompts, short memory. The scheduler alone, without a model."""

from collections import Counter, deque
from itertools import count

from hypothesis import given
from hypothesis import strategies as st
from server.engine.test_scheduler import run_step, sizes
from support.sequences import sequence

from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.scheduler import ScheduledChunk, Scheduler
from quiver_server.engine.sequence import Sequence

FLOOD, QUIET = 1, 2
_first_tokens = count(1000)


class Simulation:
    """A scheduler whose clock is its steps (of 50 ms), and what each tenant got."""

    def __init__(self, num_blocks: int = 1000, max_running: int = 16, max_step_tokens: int = 64) -> None:
        self.num_steps = 0
        self.blocks = BlockPool(num_blocks, 4)
        self.scheduler = Scheduler(self.blocks, max_running, max_step_tokens, lambda: self.num_steps * 0.05)
        self.num_drawn: Counter[str] = Counter()

    def ask(self, slot: int, prompt: int, answer: int, priority: int = 0) -> Sequence:
        """A request that begins like no other."""
        item = sequence([next(_first_tokens), *range(prompt - 1)], slot, max_new_tokens=answer)
        item.priority = priority
        self.scheduler.add(item)
        return item

    def step(self) -> list[ScheduledChunk]:
        chunks = run_step(self.scheduler)
        self.num_steps += 1
        self.num_drawn.update(chunk.sequence.fairness_key for chunk in chunks if chunk.sequence.generated)
        return chunks

    def steps_to_first_token(self, item: Sequence) -> int:
        before = self.num_steps
        while not item.generated:
            self.step()
            assert self.num_steps - before < 500
        return self.num_steps - before

    def finish(self, item: Sequence) -> None:
        while len(item.generated) < item.params.max_new_tokens:
            self.step()


def flooded(answer: int, num_requests: int = 300, **settings: int) -> Simulation:
    """Rows and queue are full of one adapter's requests, and the engine has been busy with them for a while."""
    simulation = Simulation(**settings)
    for i in range(num_requests):
        simulation.ask(FLOOD, 20 + i % 30, answer)
    for _ in range(60):
        simulation.step()
    assert len(simulation.scheduler.waiting) > 100
    return simulation


def test_a_flood_delays_nobody_elses_first_token() -> None:
    """One request at a time against 300: at most twice the steps that it takes alone, with answers short and long."""
    for answer in (8, 64, 2000):
        for prompt in (5, 64, 200):
            alone = Simulation()
            expected = [alone.steps_to_first_token(alone.ask(QUIET, prompt, 1)) for _ in range(5)]
            simulation = flooded(answer)
            for steps in expected:
                item = simulation.ask(QUIET, prompt, 6)
                assert simulation.steps_to_first_token(item) <= 2 * steps, (answer, prompt)
                simulation.finish(item)


def test_a_long_prompt_does_not_hold_up_another_adapters_short_one() -> None:
    simulation = Simulation()
    long = simulation.ask(FLOOD, 2000, 1)
    simulation.step()
    assert simulation.steps_to_first_token(simulation.ask(QUIET, 10, 1)) == 1
    assert simulation.steps_to_first_token(long) <= 2000 // 64 + 2


def test_two_floods_share_alike() -> None:
    """One came first and holds all rows, and its answers are longer; in the long run both draw as much."""
    simulation = flooded(200)
    for _ in range(300):
        simulation.ask(QUIET, 20, 50)
    simulation.num_drawn.clear()
    for _ in range(1500):
        simulation.step()
    flood, quiet = simulation.num_drawn["adapter-1"], simulation.num_drawn["adapter-2"]
    # Counters are of prompts as well, of which the shorter answers have more.
    assert 0.6 < quiet / flood < 1.1
    served = simulation.scheduler.waiting.service_received
    assert abs(served("adapter-1") - served("adapter-2")) < 3000, "a few rows' worth of long answers"


def test_a_quiet_tenant_gets_no_more_than_its_turn() -> None:
    """Whoever has rows running displaces nobody: the flood's answers get on."""
    simulation = flooded(2000)
    running = set(simulation.scheduler.running)
    for _ in range(10):
        simulation.ask(QUIET, 10, 400)
    for _ in range(30):
        simulation.step()
    assert len(running - set(simulation.scheduler.running)) == 1


def test_who_was_displaced_goes_on_without_computing_again() -> None:
    simulation = Simulation(max_running=2)
    items = [simulation.ask(FLOOD, 40, 500) for _ in range(2)]
    for _ in range(100):
        simulation.step()
    quiet = simulation.ask(QUIET, 8, 3)
    simulation.step()
    assert set(simulation.scheduler.running) == {items[0], quiet}
    drawn = len(items[1].generated)
    simulation.finish(quiet)
    (chunk,) = (chunk for chunk in simulation.step() if chunk.sequence is items[1])
    assert chunk.num_new_tokens <= 4, "all but its last block was still in the cache"
    assert len(items[1].generated) == drawn + 1


def test_priorities_order_one_adapters_requests() -> None:
    simulation = Simulation(max_running=1)
    first, low, high = (simulation.ask(FLOOD, 4, 3, priority) for priority in (0, -3, 7))
    simulation.step()
    assert list(simulation.scheduler.running) == [high]
    for item in (high, first, low):
        assert item in simulation.scheduler.running
        simulation.finish(item)
        simulation.step()


def test_a_stream_of_priorities_starves_nobody() -> None:
    simulation = Simulation(max_running=1)
    low = simulation.ask(FLOOD, 4, 2, -10)
    for _ in range(200):
        if low.generated:
            break
        simulation.ask(FLOOD, 4, 2, 10)
        simulation.step()
    assert 60 < simulation.num_steps < 70, "3 seconds of patience are 60 steps"


def test_small_ones_pass_a_large_one_until_it_is_overdue() -> None:
    """Its tenant has a row already, so that it displaces nobody, and is the least served, so that it is next."""
    simulation = Simulation(num_blocks=20)
    simulation.ask(1, 32, 8)
    simulation.step()
    simulation.scheduler.waiting.push(small := sequence(4, 2))
    simulation.scheduler.waiting.add_service("adapter-2", 50)
    large = simulation.ask(1, 60, 1)
    simulation.step()
    assert small.generated
    assert not large.generated
    simulation.num_steps += 61  # more than 3 seconds
    late = simulation.ask(2, 4, 1)
    simulation.step()
    assert not late.generated, "it passed one that is overdue"
    for _ in range(10):
        simulation.step()
    assert large.generated
    assert late.generated


def test_memory_is_taken_from_who_was_served_most() -> None:
    simulation = Simulation(num_blocks=24, max_running=8)
    quiet = simulation.ask(QUIET, 8, 20)
    flood = [simulation.ask(FLOOD, 16, 30) for _ in range(4)]
    while quiet in simulation.scheduler.running or not quiet.generated:
        simulation.step()
    assert len(quiet.generated) == 20
    assert simulation.num_steps < 25, "it never stepped back"
    assert any(item in simulation.scheduler.waiting for item in flood)
    for item in flood:
        simulation.finish(item)


requests = st.tuples(
    st.integers(0, 4),  # tenant
    st.integers(1, 40),  # prompt
    st.integers(1, 12),  # answer
    st.integers(-2, 2),  # priority
    st.integers(0, 12),  # step of arrival
)


@given(st.lists(requests, min_size=1, max_size=20), st.integers(14, 40), st.integers(1, 40), st.integers(1, 6))
def test_any_load_ends_within_its_limits(
    wanted: list[tuple[int, int, int, int, int]], num_blocks: int, max_step_tokens: int, max_running: int
) -> None:
    simulation = Simulation(num_blocks, max_running, max_step_tokens)
    scheduler, items = simulation.scheduler, list[Sequence]()
    arrivals = deque(sorted(wanted, key=lambda request: request[-1]))
    for step in range(5000):
        while arrivals and arrivals[0][-1] <= step:
            slot, prompt, answer, priority, _ = arrivals.popleft()
            items.append(simulation.ask(slot, prompt, answer, priority))
        if not (scheduler.running or scheduler.waiting):
            if not arrivals:
                break
            simulation.num_steps += 1
            continue
        chunks = simulation.step()
        assert chunks, "no progress"
        assert sum(sizes(chunks)) <= max_step_tokens
        assert len(chunks) <= min(max_running, max_step_tokens)
        assert [c.sequence.slot for c in chunks] == sorted(c.sequence.slot for c in chunks)
    assert [len(item.generated) for item in items] == [item.params.max_new_tokens for item in items]
    assert simulation.blocks.num_free_blocks == num_blocks


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60)), min_size=1, max_size=20), st.integers(1, 80))
def test_no_work_is_left_lying(wanted: list[tuple[int, int]], max_step_tokens: int) -> None:
    """With memory for all, a step uses its whole budget, or does all there is to do."""
    simulation = Simulation(10_000, 8, max_step_tokens)
    for slot, prompt in wanted:
        simulation.ask(slot, prompt, 3)
    scheduler = simulation.scheduler
    while scheduler.running or scheduler.waiting:
        chunks = scheduler.schedule()
        num_tokens = sum(sizes(chunks))
        is_full = len(scheduler.running) == min(8, max_step_tokens)
        everybody_complete = all(chunk.completes for chunk in chunks)
        assert num_tokens == max_step_tokens or (everybody_complete and (is_full or not scheduler.waiting))
        for chunk in chunks:
            completes = chunk.completes
            scheduler.note_computed(chunk)
            if completes:
                chunk.sequence.generated.append(1)
                if len(chunk.sequence.generated) == 3:
                    scheduler.remove(chunk.sequence)
