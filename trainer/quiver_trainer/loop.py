"""The training loop: the batches of all runs on one frozen base go through it in one forward and backward pass.

A run's result does not depend on the others: rows meet nowhere, and each run has its own optimiser, order and numbers.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from quiver_trainer.batches import Batch
from quiver_trainer.errors import TrainingInterrupted
from quiver_trainer.evaluate import completion_losses
from quiver_trainer.report import Reporter
from quiver_trainer.run import Run


def train(
    runs: Sequence[Run],
    reporter: Reporter,
    *,
    pass_tokens: int,
    should_stop: Callable[[], bool],
    on_over: Callable[[Run], None],
) -> None:
    """All remaining steps of all runs, from wherever each stands.

    pass_tokens: about how many tokens go through the base together; it bounds the memory of many runs.
    should_stop: asked before each step; TrainingInterrupted is then raised, with a checkpoint saved for each run.
    on_over: called with each run as soon as it is over.
    """
    first_step, num_steps = sum(run.progress.step for run in runs), sum(run.num_steps for run in runs)
    with reporter.training(first_step, num_steps, several=len(runs) > 1):
        for run in runs:
            run.begin()
        over = [run for run in runs if run.is_over]
        running = [run for run in runs if not run.is_over]
        while True:
            for run in over:
                on_over(run)
            if not running:
                return
            if should_stop():
                raise _stopped(running)
            for together in _passes([(run, run.next_batch()) for run in running], pass_tokens):
                _step(together)
            over = [run for run in running if run.is_over]
            running = [run for run in running if not run.is_over]


def _passes(work: Sequence[tuple[Run, Batch]], pass_tokens: int) -> Iterator[list[tuple[Run, Batch]]]:
    """The batches in portions of at most so many tokens, or of one batch."""
    portion: list[tuple[Run, Batch]] = []
    for run, batch in work:
        if portion and sum(b.num_tokens for _, b in portion) + batch.num_tokens > pass_tokens:
            yield portion
            portion = []
        portion.append((run, batch))
    yield portion


def _step(together: Sequence[tuple[Run, Batch]]) -> None:
    """One step of each run."""
    started = time.perf_counter()
    models, batches = [run.model for run, _ in together], [batch for _, batch in together]
    losses = completion_losses(models, batches, [run.stream.drawing for run, _ in together])
    # Each adapter's gradient is that of its own loss: the others do not depend on it.
    torch.stack(losses).sum().backward()
    values = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    num_tokens = sum(batch.num_tokens for batch in batches)
    for (run, batch), loss in zip(together, values, strict=True):
        run.take_step(batch, loss, seconds * batch.num_tokens / num_tokens)


def _stopped(running: Sequence[Run]) -> TrainingInterrupted:
    """Saves all of them."""
    for run in running:
        run.save()
    done = ", ".join(f"{run.name} " * (len(running) > 1) + f"{run.progress.step} of {run.num_steps}" for run in running)
    return TrainingInterrupted(f"stopped after step {done}")
