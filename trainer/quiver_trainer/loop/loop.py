"""The training loop: the batches of all runs on one frozen base go through it in one forward and backward pass.

A run's result does not depend on the other runs: each has its own rows, optimizer, order and RNG.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch

from quiver_trainer.data.batching import Batch
from quiver_trainer.errors import TrainingInterrupted
from quiver_trainer.loop.metrics import completion_losses
from quiver_trainer.loop.run import Run
from quiver_trainer.reports.terminal import Reporter

_Work = tuple[Run, Sequence[Batch]]


def train(
    runs: Sequence[Run],
    reporter: Reporter,
    *,
    pass_tokens: int,
    should_stop: Callable[[], bool],
    on_over: Callable[[Run], None],
) -> None:
    """Train all runs to their end, each from its current step.

    pass_tokens: tokens per forward pass, approximately; it bounds the memory of many runs.
    should_stop: called before each step; if true, saves a checkpoint of each run and raises TrainingInterrupted.
    on_over: called with each finished run.
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
            for together in _passes([(run, run.next_batches()) for run in running], pass_tokens):
                _step(together)
            over = [run for run in running if run.is_over]
            running = [run for run in running if not run.is_over]


def _passes(work: Sequence[_Work], pass_tokens: int) -> Iterator[list[_Work]]:
    """Groups of runs whose largest batches fit into `pass_tokens` together; at least one run each."""
    portion: list[_Work] = []
    size = 0
    for run, batches in work:
        largest = max(batch.num_tokens for batch in batches)
        if portion and size + largest > pass_tokens:
            yield portion
            portion, size = [], 0
        portion.append((run, batches))
        size += largest
    yield portion


def _step(together: Sequence[_Work]) -> None:
    """One step of each run: the first micro-batch of all runs together, then the second, ..."""
    started = time.perf_counter()
    num_targets = {run: sum(len(batch.targets) for batch in batches) for run, batches in together}
    losses = {run: 0.0 for run, _ in together}
    for i in range(max(len(batches) for _, batches in together)):
        part = [(run, batches[i]) for run, batches in together if i < len(batches)]
        shares = [len(batch.targets) / num_targets[run] for run, batch in part]
        for (run, _), share, loss in zip(part, shares, _backward(part, shares), strict=True):
            losses[run] += share * loss
    seconds = time.perf_counter() - started
    num_tokens = {run: sum(batch.num_tokens for batch in batches) for run, batches in together}
    for run, batches in together:
        run.take_step(batches, losses[run], seconds * num_tokens[run] / sum(num_tokens.values()))


def _backward(part: Sequence[tuple[Run, Batch]], shares: Sequence[float]) -> list[float]:
    """Accumulates the gradients of each run; returns the losses. shares: weight of each batch in its step's loss."""
    models, batches = [run.model for run, _ in part], [batch for _, batch in part]
    streams = [run.stream for run, _ in part]
    alone = len(part) == 1
    # One run draws as a whole, so that layers which are computed twice can draw the same again.
    with streams[0].scope() if alone else nullcontext():
        losses = torch.stack(completion_losses(models, batches, None if alone else [s.scope for s in streams]))
        scales = [share * run.loss_scale for (run, _), share in zip(part, shares, strict=True)]
        # Each adapter's gradient is that of its own loss: the others do not depend on it.
        (losses * torch.tensor(scales, device=losses.device)).sum().backward()
    return losses.tolist()


def _stopped(running: Sequence[Run]) -> TrainingInterrupted:
    for run in running:
        run.save()
    done = ", ".join(f"{run.name} " * (len(running) > 1) + f"{run.progress.step} of {run.num_steps}" for run in running)
    return TrainingInterrupted(f"stopped after step {done}")
