"""The step loop on a real tiny model: a small cache changes no token, a failing step ends only its sequences."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from server.sequences import sequence
from tiny import hf_greedy, hf_model, random_prompts
from torch import Tensor

from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedKV
from quiver_server.batch import StepBatch
from quiver_server.blocks import BlockPool
from quiver_server.engine import Delivery, Engine
from quiver_server.errors import EngineFaultError
from quiver_server.metrics import Metrics
from quiver_server.request import FinishReason, Sequence, TokenEvent
from quiver_server.runner import Runner
from quiver_server.scheduler import Scheduler

BLOCK_SIZE = 4
CPU = torch.device("cpu")


class FailingRunner(Runner):
    """Fails once, in the step that `should_fail` chooses."""

    should_fail: Callable[[StepBatch], bool] | None = None

    def run(self, batch: StepBatch) -> Tensor:
        if self.should_fail is not None and self.should_fail(batch):
            self.should_fail = None
            raise RuntimeError("a broken kernel")
        return super().run(batch)


class Driver:
    """An engine that is stepped by hand, and what it said for each sequence."""

    def __init__(self, base: GPTBase, num_blocks: int, max_step_tokens: int = 16) -> None:
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(self.blocks, 8, max_step_tokens)
        kv = PagedKV(base.config, num_blocks, BLOCK_SIZE, torch.float32, CPU)
        self.runner = FailingRunner(base, AdapterBanks(2**20, torch.float32, CPU), kv)
        self.events: dict[int, list[TokenEvent]] = {}
        self.num_step_backs = 0
        self.engine = Engine(
            self.runner,
            self.scheduler,
            block_size=BLOCK_SIZE,
            device=CPU,
            metrics=Metrics(self.blocks),
            deliver=self._take,
        )

    def _take(self, events: Delivery) -> None:
        for item, event in events:
            self.events.setdefault(id(item), []).append(event)

    def run(self, sequences: list[Sequence]) -> list[list[int]]:
        """Until all have ended; returns their tokens."""
        for item in sequences:
            self.scheduler.add(item)
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            running = set(map(id, self.scheduler.running))
            self.engine.step()
            self.num_step_backs += sum(id(item) in running for item in self.scheduler.waiting)
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        return [self.tokens(item) for item in sequences]

    def tokens(self, item: Sequence) -> list[int]:
        return [event.token_id for event in self.events.get(id(item), []) if event.token_id is not None]


@pytest.fixture(scope="module")
def base(llama_base: Path) -> GPTBase:
    return GPTBase.from_pretrained(llama_base)


def test_a_small_cache_gives_the_same_tokens(base: GPTBase, llama_base: Path) -> None:
    prompts = random_prompts([3, 17, 9, 24, 1], seed=4)
    oracle = hf_model(llama_base)
    expected = [hf_greedy(oracle, prompt, 15, stop_ids=[319]) for prompt in prompts]

    def ask() -> list[Sequence]:
        return [sequence(prompt, max_new_tokens=15, eos_ids=frozenset({319})) for prompt in prompts]

    large, small = Driver(base, 200), Driver(base, 11)
    for driver in (large, small):
        tokens = driver.run(ask())
        assert [ids[:-1] if ids[-1] == 319 else ids for ids in tokens] == expected
    assert large.num_step_backs == 0
    assert small.num_step_backs > 0, "the cache was not small enough to show anything"


def test_stepping_back_repeats_no_draw_and_no_prompt_logprob(base: GPTBase) -> None:
    prompts = random_prompts([20, 20, 20], seed=9)

    def ask() -> list[Sequence]:
        return [
            sequence(prompt, temperature=1.0, seed=i, max_new_tokens=14, prompt_logprobs=True, num_top_logprobs=0)
            for i, prompt in enumerate(prompts)
        ]

    large, small = Driver(base, 200), Driver(base, 12)
    many, few = ask(), ask()
    assert large.run(many) == small.run(few)
    assert small.num_step_backs > 0
    for item, other in zip(many, few, strict=True):
        first, again = large.events[id(item)][0].prompt_logprobs, small.events[id(other)][0].prompt_logprobs
        assert [x.token_id for x in first] == [x.token_id for x in again] == item.prompt[1:]
        assert [x.logprob for x in first] == pytest.approx([x.logprob for x in again], abs=1e-4)


def test_a_failing_step_ends_only_its_sequences(base: GPTBase, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(base, 20, max_step_tokens=16)
    lost, waiting = sequence(16, max_new_tokens=4), sequence(5, max_new_tokens=4)
    driver.runner.should_fail = lambda batch: len(batch.tokens) == 16
    tokens = driver.run([lost, waiting])
    (event,) = driver.events[id(lost)]
    assert isinstance(event.error, EngineFaultError)
    assert "the engine could not compute this request: RuntimeError: a broken kernel" in str(event.error)
    assert event.is_last
    assert tokens[0] == []
    assert tokens[1] == Driver(base, 20).run([sequence(5, max_new_tokens=4)])[0]
    assert "a step of 1 sequences failed" in caplog.text


def test_the_last_event_says_why(base: GPTBase) -> None:
    first = Driver(base, 20).run([sequence(6, max_new_tokens=3)])[0]
    for params, reason in (
        ({"eos_ids": frozenset({first[0]})}, FinishReason.EOS),
        ({"stop_ids": frozenset({first[0]})}, FinishReason.STOP_TOKEN),
        ({"max_new_tokens": 1}, FinishReason.LENGTH),
    ):
        driver = Driver(base, 20)
        item = sequence(6, params=params)
        driver.run([item])
        assert [event.finish_reason for event in driver.events[id(item)]] == [reason]


def test_threads_submit_cancel_and_stop(base: GPTBase) -> None:
    """The loop itself: it sleeps without work, lets a cancelled row go with a last event, and ends when told."""
    import threading

    driver = Driver(base, 40)
    begun, gone = threading.Event(), threading.Event()
    events: list[TokenEvent] = []

    def deliver(delivery: Delivery) -> None:
        events.extend(event for _, event in delivery)
        begun.set()
        if events[-1].is_last:
            gone.set()

    metrics = Metrics(driver.blocks)
    engine = Engine(
        driver.runner, driver.scheduler, block_size=BLOCK_SIZE, device=CPU, metrics=metrics, deliver=deliver
    )
    engine.start()
    item = sequence(5, max_new_tokens=150)
    engine.submit(item)
    assert begun.wait(20)
    engine.cancel(item)
    assert gone.wait(20)
    assert (events[-1].token_id, events[-1].error) == (None, None)
    assert len(events) < 150
    assert driver.blocks.num_free_blocks == driver.blocks.num_blocks
    engine.stop()
