"""The step loop on a real tiny model: a small cache changes no token, a failing step ends only its sequences."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engine_driver import BLOCK_SIZE, CPU, Driver
from support.sequences import sequence
from support.tiny import hf_greedy, hf_model, random_prompts
from torch import Tensor

from quiver_peft.base.gpt import GPTBase
from quiver_server.engine.batch import StepBatch
from quiver_server.engine.engine import Delivery, Engine
from quiver_server.engine.sequence import FinishReason, Sequence, TokenEvent
from quiver_server.errors import EngineFaultError
from quiver_server.telemetry.metrics import Metrics


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
        first, again = large.events[item][0].prompt_logprobs, small.events[other][0].prompt_logprobs
        assert [x.token_id for x in first] == [x.token_id for x in again] == item.prompt[1:]
        assert [x.logprob for x in first] == pytest.approx([x.logprob for x in again], abs=1e-4)


def test_a_failing_step_ends_only_its_sequences(base: GPTBase, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(base, 20, max_step_tokens=16)
    lost, waiting = sequence(16, max_new_tokens=4), sequence(5, max_new_tokens=4)
    driver.runner.should_fail = lambda batch: len(batch.tokens) == 16
    tokens = driver.run([lost, waiting])
    (event,) = driver.events[lost]
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
        assert [event.finish_reason for event in driver.events[item]] == [reason]


def threaded_engine(driver: Driver, deliver: Callable[[Delivery], None], dead: threading.Event | None = None) -> Engine:
    """The driver's parts with a loop in a thread."""
    return Engine(
        driver.runner,
        driver.scheduler,
        block_size=BLOCK_SIZE,
        device=CPU,
        metrics=Metrics(),
        deliver=deliver,
        on_dead=(dead or threading.Event()).set,
    )


def test_logits_that_overflow_end_their_own_row_only(base: GPTBase) -> None:
    driver = Driver(base, 40)
    compute = driver.runner.run
    values = iter([torch.nan, torch.inf])

    def run(batch: StepBatch) -> Tensor:
        logits = compute(batch).clone()
        logits[-1, 7] = next(values, 0.0)
        return logits

    driver.runner.run = run  # type: ignore[method-assign]
    items = [sequence([20 + i] * 4, max_new_tokens=3, temperature=float(i)) for i in range(3)]
    for item in items:
        item.fairness_key = "wild"
    assert sorted(map(len, driver.run(items))) == [0, 1, 3]
    errors = [driver.events[item][-1].error for item in items]
    assert errors.count(None) == 1
    for error in filter(None, errors):
        assert isinstance(error, EngineFaultError)
        assert "adapter 'wild' computes logits that are not finite" in str(error)


def test_a_loop_that_fails_tells_everybody_and_takes_nobody(base: GPTBase, caplog: pytest.LogCaptureFixture) -> None:
    """What a step cannot contain, such as a fault of the scheduler, ends the engine: never a silent wait."""
    driver, dead = Driver(base, 40), threading.Event()
    events: dict[Sequence, TokenEvent] = {}
    engine = threaded_engine(driver, events.update, dead)

    def schedule() -> None:
        raise IndexError("a fault of the scheduler")

    driver.scheduler.schedule = schedule  # type: ignore[method-assign]
    early, late = sequence(5), sequence(5)
    engine.submit(early)
    engine.start()
    assert dead.wait(20)
    engine.submit(late)
    for item in (early, late):
        assert "the engine has failed and the server is stopping" in str(events[item].error)
        assert events[item].is_last
    assert "a fault of the scheduler" in caplog.text
    engine.stop()


def test_threads_submit_cancel_and_stop(base: GPTBase) -> None:
    """The loop itself: it sleeps without work, lets a cancelled row go with a last event, and ends when told."""
    driver = Driver(base, 40)
    begun, gone = threading.Event(), threading.Event()
    events: list[TokenEvent] = []

    def deliver(delivery: Delivery) -> None:
        events.extend(event for _, event in delivery)
        begun.set()
        if events[-1].is_last:
            gone.set()

    engine = threaded_engine(driver, deliver)
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
