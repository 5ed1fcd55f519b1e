"""The training loop of one run: steps, measurements and checkpoints, from wherever the run stands to its end."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.batches import Batch, BatchLimits, collate, plan_epoch
from quiver_trainer.checkpoint import read_checkpoint, restore, write_checkpoint
from quiver_trainer.config import TrainConfig
from quiver_trainer.data import Dataset, Sample, spread_evenly
from quiver_trainer.errors import TrainingError, TrainingInterrupted
from quiver_trainer.evaluate import completion_loss, exact_match, validation_loss
from quiver_trainer.optimiser import learning_rate, make_optimiser, peak_rate, set_learning_rate
from quiver_trainer.progress import Progress, ValidationRecord, record_interval
from quiver_trainer.report import Reporter
from quiver_trainer.workplace import Workplace


@dataclass(frozen=True)
class Measuring:
    """Validation samples. every: steps from one measurement to the next."""

    loss_samples: list[Sample]
    match_samples: list[Sample]
    every: int


class TrainingLoop:
    """One run on one device. Everything is settled at construction; `run` does the work."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        tokenizer: Tokenizer,
        train: Dataset,
        validation: Dataset | None,
        workplace: Workplace,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._model = model
        self._tokenizer = tokenizer
        self._samples = train.samples
        self._lengths = [len(sample.tokens) for sample in train.samples]
        self._limits = BatchLimits(config.token_budget, config.batch_size)
        self._workplace = workplace
        self._reporter = reporter
        self._parameters = trainable(model)
        methods = () if model.adapter is None else model.adapter.configs
        self._peak_rate = peak_rate(config.optimiser, [method.to_dict()["method"] for method in methods])
        self._optimiser = make_optimiser(self._parameters, config.optimiser, self._peak_rate)
        self._plan: list[list[int]] = []
        self.num_steps = self._count_steps()
        self.measuring = _what_to_measure(config, validation, self.num_steps)
        self.progress = Progress()

    def _count_steps(self) -> int:
        """All steps of the run. Batches are cut anew for each epoch, so epochs may differ a little."""
        limit = self._config.max_steps
        total = 0
        for epoch in range(self._config.epochs):
            if limit is not None and total >= limit:
                break
            total += len(self._plan_epoch(epoch))
        return total if limit is None else min(total, limit)

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._lengths, self._limits, seed=self._config.seed, epoch=epoch)

    def resume(self) -> None:
        """Go on from the checkpoint, whose settings have been compared."""
        checkpoint = read_checkpoint(self._workplace.checkpoint)
        assert checkpoint is not None
        restore(checkpoint, self._parameters, self._optimiser)
        self.progress = checkpoint.progress

    def run(self, settings: Mapping[str, Any], should_stop: Callable[[], bool]) -> None:
        """All remaining steps; the model is then trained, and a checkpoint of the end lies in the workplace.

        should_stop: asked before each step. Raises TrainingInterrupted when it says so, TrainingError for a loss that
        is not a number.
        """
        self._workplace.write_metrics([*self.progress.train_records, *self.progress.validation_records])
        self._plan = self._plan_epoch(self.progress.epoch)
        self._model.train()
        with self._reporter.training(self.progress.step, self.num_steps):
            while (step := self.progress.step) < self.num_steps:
                if should_stop():
                    self._save(settings)
                    raise TrainingInterrupted(f"stopped after step {step} of {self.num_steps}")
                if step == 0:
                    self._measure()
                self._step()
                last = step + 1 == self.num_steps
                if last or (self.measuring is not None and (step + 1) % self.measuring.every == 0):
                    self._measure()
                if last or (step + 1) % self._config.checkpoint_interval_steps == 0:
                    self._save(settings)

    def _save(self, settings: Mapping[str, Any]) -> None:
        write_checkpoint(self._workplace.checkpoint, self._parameters, self._optimiser, self.progress, settings)

    def _step(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        if progress.batch == len(self._plan):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self._plan = self._plan_epoch(progress.epoch)
        samples = [self._samples[i] for i in self._plan[progress.batch]]
        batch = collate(samples, self._model)
        rate = learning_rate(progress.step, self.num_steps, self._peak_rate, self._config.schedule)
        loss, gradient_norm = self._update(batch, rate)
        seconds = time.perf_counter() - started
        progress.add_step(loss, len(batch.targets), batch.num_tokens, seconds)
        self._reporter.step(progress.step, loss, batch.num_tokens, seconds)
        if progress.step % record_interval(self.num_steps) == 0 or progress.step == self.num_steps:
            epoch = progress.epoch + progress.batch / len(self._plan)
            self._workplace.append_metrics(progress.close_window(epoch, rate, gradient_norm))

    def _update(self, batch: Batch, rate: float) -> tuple[float, float]:
        """One AdamW step; its loss and the length of its gradient before clipping."""
        set_learning_rate(self._optimiser, rate)
        loss = completion_loss(self._model, batch)
        loss.backward()
        limit = self._config.optimiser.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), math.inf if limit is None else limit)
        loss_value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise TrainingError(
                f"step {self.progress.step + 1}: the loss is {loss_value} and its gradient {norm_value}; nothing of "
                f"this step was kept. Lower optimiser.learning_rate ({self._peak_rate:g}), or set "
                "optimiser.max_gradient_norm"
            )
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss_value, norm_value

    def _measure(self) -> None:
        """Append a validation record, where there is anything to measure on."""
        measuring, progress = self.measuring, self.progress
        if measuring is None:
            return
        started = time.perf_counter()
        with self._reporter.validating():
            loss = validation_loss(self._model, measuring.loss_samples, self._limits)
            match = None
            if measuring.match_samples:
                limit = self._config.evaluation.max_new_tokens
                match = exact_match(self._model, self._tokenizer, measuring.match_samples, limit)
        progress.seconds += time.perf_counter() - started
        record = ValidationRecord(progress.step, progress.tokens, round(progress.seconds, 3), loss, match)
        progress.validation_records.append(record)
        self._workplace.append_metrics(record)
        self._reporter.validation(record)


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
