"""One run: its rows, what it trains, its optimiser, its progress. The loop computes; a run says what, and keeps it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.batches import Batch, BatchLimits, collate, plan_epoch
from quiver_trainer.checkpoint import read_checkpoint, restore, write_checkpoint
from quiver_trainer.config import TrainConfig
from quiver_trainer.data import Dataset, Sample, spread_evenly
from quiver_trainer.errors import TrainingError
from quiver_trainer.evaluate import exact_match, validation_loss
from quiver_trainer.optimiser import learning_rate, make_optimiser, peak_rate, set_learning_rate
from quiver_trainer.progress import Progress, ValidationRecord, record_interval
from quiver_trainer.random_stream import RandomStream
from quiver_trainer.report import Reporter
from quiver_trainer.workplace import Workplace


@dataclass(frozen=True)
class Measuring:
    """Validation samples. every: steps from one measurement to the next."""

    loss_samples: list[Sample]
    match_samples: list[Sample]
    every: int


class Run:
    """Everything is settled at construction. failure: why it cannot go on, once it cannot."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        tokenizer: Tokenizer,
        datasets: Mapping[str, Dataset],
        settings: Mapping[str, Any],
        reporter: Reporter,
    ) -> None:
        """datasets: "train" and, where there is one, "validation". settings: what a checkpoint must agree with."""
        self.config = config
        self.model = model
        self.name = config.output.name
        self.datasets = datasets
        self.settings = settings
        self.failure: TrainingError | None = None
        self.stream = RandomStream(config.seed)
        self.workplace = Workplace(config.output)
        self._tokenizer = tokenizer
        self._samples = datasets["train"].samples
        self._lengths = [len(sample.tokens) for sample in self._samples]
        self._limits = BatchLimits(config.token_budget, config.batch_size)
        self._reporter = reporter
        self.parameters = trainable(model)
        methods = () if model.adapter is None else model.adapter.configs
        self._peak_rate = peak_rate(config.optimiser, [method.to_dict()["method"] for method in methods])
        self._optimiser = make_optimiser(self.parameters, config.optimiser, self._peak_rate)
        self._plan: list[list[int]] = []
        self.num_steps = self._count_steps()
        self.measuring = _what_to_measure(config, datasets.get("validation"), self.num_steps)
        self.progress = Progress()

    def _count_steps(self) -> int:
        """All steps of the run. Batches are cut anew for each epoch, so epochs may differ a little."""
        limit = self.config.max_steps
        total = 0
        for epoch in range(self.config.epochs):
            if limit is not None and total >= limit:
                break
            total += len(self._plan_epoch(epoch))
        return total if limit is None else min(total, limit)

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._lengths, self._limits, seed=self.config.seed, epoch=epoch)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or it failed."""
        return self.failure is not None or self.progress.step >= self.num_steps

    def resume(self) -> None:
        """Go on from the checkpoint, whose settings have been compared."""
        checkpoint = read_checkpoint(self.workplace.checkpoint)
        assert checkpoint is not None
        restore(checkpoint, self.parameters, self._optimiser, self.stream)
        self.progress = checkpoint.progress

    def begin(self) -> None:
        """Before the first step of this process; measures where nothing was trained yet."""
        self.workplace.write_metrics([*self.progress.train_records, *self.progress.validation_records])
        self._plan = self._plan_epoch(self.progress.epoch)
        self.model.train()
        if self.progress.step == 0:
            self._measure()

    def next_batch(self) -> Batch:
        """What the next step learns from."""
        progress = self.progress
        if progress.batch == len(self._plan):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self._plan = self._plan_epoch(progress.epoch)
        return collate([self._samples[i] for i in self._plan[progress.batch]], self.model)

    def take_step(self, batch: Batch, loss: float, seconds: float) -> None:
        """Use the gradients of a batch. Sets `failure`, and keeps nothing of the step, when they are no numbers.

        seconds: that the loss and its gradients took.
        """
        started = time.perf_counter()
        progress = self.progress
        rate = learning_rate(progress.step, self.num_steps, self._peak_rate, self.config.schedule)
        set_learning_rate(self._optimiser, rate)
        limit = self.config.optimiser.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), math.inf if limit is None else limit).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.failure = TrainingError(
                f"{self.name}: step {progress.step + 1}: the loss is {loss} and its gradient {norm}; nothing of "
                f"this step was kept. Lower optimiser.learning_rate ({self._peak_rate:g}), or set "
                "optimiser.max_gradient_norm"
            )
            return
        self._optimiser.step()
        self._optimiser.zero_grad()
        seconds += time.perf_counter() - started
        progress.add_step(loss, len(batch.targets), batch.num_tokens, seconds)
        self._reporter.step(self.name, loss, batch.num_tokens, seconds)
        self._after_step(rate, norm)

    def _after_step(self, rate: float, gradient_norm: float) -> None:
        """Records, measurements and checkpoints that are due."""
        progress, step = self.progress, self.progress.step
        last = step == self.num_steps
        if last or step % record_interval(self.num_steps) == 0:
            epoch = progress.epoch + progress.batch / len(self._plan)
            self.workplace.append_metrics(progress.close_window(epoch, rate, gradient_norm))
        if last or (self.measuring is not None and step % self.measuring.every == 0):
            self._measure()
        if last or step % self.config.checkpoint_interval_steps == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint to go on from."""
        write_checkpoint(
            self.workplace.checkpoint, self.parameters, self._optimiser, self.stream, self.progress, self.settings
        )

    def _measure(self) -> None:
        """Append a validation record, where there is anything to measure on."""
        measuring, progress = self.measuring, self.progress
        if measuring is None:
            return
        started = time.perf_counter()
        with self._reporter.validating():
            loss = validation_loss(self.model, measuring.loss_samples, self._limits)
            match = None
            if measuring.match_samples:
                limit = self.config.evaluation.max_new_tokens
                match = exact_match(self.model, self._tokenizer, measuring.match_samples, limit)
        progress.seconds += time.perf_counter() - started
        record = ValidationRecord(progress.step, progress.tokens, round(progress.seconds, 3), loss, match)
        progress.validation_records.append(record)
        self.workplace.append_metrics(record)
        self._reporter.validation(self.name, record)


def trainable(model: AnyModel) -> dict[str, nn.Parameter]:
    """What is trained, by name. Raises TrainingError when everything is frozen."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise TrainingError("nothing of this model is trainable: it was frozen; load it again, then add_adapter")
    return found


def _what_to_measure(config: TrainConfig, validation: Dataset | None, num_steps: int) -> Measuring | None:
    if validation is None:
        return None
    match_count = config.evaluation.exact_match_samples
    return Measuring(
        loss_samples=spread_evenly(validation.samples, config.evaluation.loss_samples),
        match_samples=spread_evenly(validation.samples, match_count) if match_count else [],
        every=config.evaluation.interval_steps or max(1, -(-num_steps // 5)),
    )
