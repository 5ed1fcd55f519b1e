"""A training run: its datasets, parameters, optimizer, progress and checkpoints. The loop computes its gradients."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from quiver_peft import T5
from quiver_peft.model import AnyModel
from quiver_peft.rounding import ceil_div
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import Batch, BatchLimits, collate, plan_epoch
from quiver_trainer.data.dataset import Dataset
from quiver_trainer.data.jsonl import Sample
from quiver_trainer.data.span_corruption import SpanCorruptor
from quiver_trainer.errors import TrainingError
from quiver_trainer.loop.checkpoint import read_checkpoint, restore, write_checkpoint
from quiver_trainer.loop.optimizer import make_optimizer, peak_rates, rate_factor, set_learning_rate
from quiver_trainer.loop.rng import RunRng
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.loop.validation import BestWeights, BestWeightsFile, Validator
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.reports.progress import Progress, TrainRecord, ValidationRecord, record_interval
from quiver_trainer.reports.tensorboard import EventFile
from quiver_trainer.reports.terminal import Reporter

# Good steps after which a loss scale is doubled again.
_STEPS_AT_SCALE = 200


class Run:
    """The state of one run. failure: the error that ended it, or None."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        tokenizer: Tokenizer,
        datasets: Mapping[str, Dataset],
        settings: Mapping[str, Any],
        reporter: Reporter,
    ) -> None:
        """datasets: "train" and optionally "validation". settings: what a checkpoint must match."""
        self.config = config
        self.model = model
        self.name = config.output.name
        self.datasets = datasets
        self.settings = settings
        self.failure: TrainingError | None = None
        self.stream = RunRng(config.seed)
        self.run_directory = RunDirectory(config.output)
        self.tokenizer = tokenizer
        self._samples = datasets["train"]
        self.limits = BatchLimits(config.token_budget, config.batch_size)
        self._reporter = reporter
        self.parameters = trainable(model)
        methods = None if model.adapter is None else [method.name for method in model.adapter.ordered_methods]
        peaks = peak_rates(self.parameters, config.optimizer, methods)
        self.optimizer = make_optimizer(self.parameters, config.optimizer, peaks)
        self._plan: list[list[int]] = []
        self.num_steps = self._count_steps()
        mends = isinstance(model, T5) and any(data.has_raw_text for data in datasets.values())
        self._span_corruptor = (
            SpanCorruptor(tokenizer, model.base.config.eos_token_ids[0], config.seed) if mends else None
        )
        validation = datasets.get("validation")
        self.validator = None
        if validation is not None:
            self.validator = self.make_validator(validation, self._span_corruptor)
        self.best: BestWeights = BestWeightsFile(self.run_directory.folder / "best.safetensors")
        self._events = config.tensorboard and EventFile(config.tensorboard / self.name)
        self.progress = Progress()

    def _count_steps(self) -> int:
        """Steps of the whole run. Batches are planned for each epoch, so epochs may differ slightly."""
        limit = self.config.max_steps
        total = 0
        for epoch in range(self.config.epochs):
            if limit is not None and total >= limit:
                break
            total += ceil_div(len(self._plan_epoch(epoch)), self.config.accumulation)
        return total if limit is None else min(total, limit)

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        seed = self.config.seed
        places = self._samples.epoch(seed, epoch)
        return plan_epoch(places, self._samples.lengths, self.limits, seed=seed, epoch=epoch)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended: all steps done, stopped early, or failed."""
        return self.failure is not None or self.progress.stopped_early or self.progress.step >= self.num_steps

    @property
    def loss_scale(self) -> float:
        """The loss scale of float16 training; 1 otherwise."""
        return self.progress.loss_scale if self.config.dtype == "float16" else 1.0

    def resume(self) -> None:
        """Resume from the checkpoint, whose settings have been compared."""
        checkpoint = read_checkpoint(self.run_directory.checkpoint)
        assert checkpoint is not None
        restore(checkpoint, self.parameters, self.optimizer, self.stream)
        self.progress = checkpoint.progress

    def begin(self) -> None:
        """Start this process's part of the run; a fresh run validates first."""
        self.run_directory.write_metrics([*self.progress.train_records, *self.progress.validation_records])
        self._plan = self._plan_epoch(self.progress.epoch)
        self.model.train()
        if self.progress.step == 0:
            self._validate()

    def make_validator(self, validation: Dataset, mender: SpanCorruptor | None) -> Validator:
        """The validator of the validation rows."""
        return Validator(self.config.evaluation, validation, mender, self.limits, self.num_steps)

    def next_samples(self) -> list[list[Sample]]:
        """Samples of the next step: `accumulation` batches, fewer at the end of an epoch."""
        progress = self.progress
        if progress.batch == len(self._plan):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self._plan = self._plan_epoch(progress.epoch)
        batches = self._plan[progress.batch : progress.batch + self.config.accumulation]
        return [[self._sample(place) for place in batch] for batch in batches]

    def next_batches(self) -> list[Batch]:
        """`next_samples` as model inputs."""
        return [collate(samples, self.model) for samples in self.next_samples()]

    def _sample(self, place: int) -> Sample:
        sample = self._samples[place]
        return sample if self._span_corruptor is None else self._span_corruptor(sample, place, self.progress.epoch)

    def take_step(self, batches: Sequence[Batch], loss: float, seconds: float) -> None:
        """Apply the accumulated gradients. Sets `failure` and discards the step if they are not finite.

        seconds: time of the forward and backward pass.
        """
        started = time.perf_counter()
        factor = rate_factor(self.progress.step, self.num_steps, self.config.schedule)
        rate = set_learning_rate(self.optimizer, factor)
        norm = self._clip_gradients()
        overflowed = self.config.dtype == "float16" and math.isfinite(loss) and not math.isfinite(norm)
        if not overflowed and not (math.isfinite(loss) and math.isfinite(norm)):
            self._fail(f"the loss is {loss} and its gradient {norm}; nothing of this step was kept", rate)
            return
        if not overflowed:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._adapt_scale(overflowed)
        seconds += time.perf_counter() - started
        num_tokens = sum(batch.num_tokens for batch in batches)
        self.progress.add_step(loss, sum(len(b.targets) for b in batches), num_tokens, len(batches), seconds)
        self._reporter.step(self.name, loss, num_tokens, seconds)
        limit = self.config.max_loss_rise
        if limit is not None and self.progress.loss_rise > limit:
            lowest = self.progress.lowest_loss
            self._fail(
                f"the smoothed loss was {lowest:.3f} and is {self.progress.smoothed_loss:.3f}: it diverges", rate
            )
            return
        self._after_step(rate, norm)

    def _clip_gradients(self) -> float:
        """Unscale and clip the gradients; returns their norm before clipping."""
        parameters = list(self.parameters.values())
        if self.loss_scale != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.loss_scale
        limit = self.config.optimizer.max_gradient_norm
        return self.clip(math.inf if limit is None else limit)

    def clip(self, longest: float) -> float:
        """Clip the gradient norm to `longest`; returns the norm before clipping."""
        return nn.utils.clip_grad_norm_(list(self.parameters.values()), longest).item()

    def _adapt_scale(self, overflowed: bool) -> None:
        progress = self.progress
        progress.steps_at_scale = 0 if overflowed else progress.steps_at_scale + 1
        if overflowed:
            progress.loss_scale /= 2
        elif progress.steps_at_scale % _STEPS_AT_SCALE == 0:
            progress.loss_scale *= 2

    def _fail(self, what: str, rate: float) -> None:
        self.failure = TrainingError(
            f"{self.name}: step {self.progress.step + 1}: {what}. The last checkpoint stays. Lower "
            f"optimizer.learning_rate ({rate:g} here), or set optimizer.max_gradient_norm"
        )

    def _after_step(self, rate: float, gradient_norm: float) -> None:
        """Write the records, validations and checkpoints that are due."""
        progress, step = self.progress, self.progress.step
        last = step == self.num_steps
        if last or (self.validator is not None and step % self.validator.every == 0):
            self._validate()
        last = last or progress.stopped_early
        if last or step % record_interval(self.num_steps) == 0:
            epoch = progress.epoch + progress.batch / len(self._plan)
            self._record(progress.close_window(epoch, rate, gradient_norm))
        if last or step % self.config.checkpoint_interval_steps == 0:
            self.save()

    def _record(self, record: TrainRecord | ValidationRecord) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        self.run_directory.append_metrics(record)
        if self._events:
            scalars = {name: value for name, value in asdict(record).items() if value is not None and name != "step"}
            self._events.add(record.step, scalars)

    def save(self) -> None:
        """Write a checkpoint."""
        write_checkpoint(
            self.run_directory.checkpoint, self.parameters, self.optimizer, self.stream, self.progress, self.settings
        )

    def finish(self) -> None:
        """Finish the run: restore the best weights if they are to be kept."""
        if self.config.evaluation.keep == "best":
            self.best.restore(self.parameters)

    def _validate(self) -> None:
        """Validate and append a record; nothing without validation rows."""
        if self.validator is None:
            return
        with self._reporter.validating():
            record = self.validator.measure(self.model, self.tokenizer, self.progress)
        if self.progress.add_validation(record) and self.config.evaluation.keep == "best":
            self.best.keep(self.parameters)
        patience = self.config.evaluation.patience
        if patience is not None and self.progress.measured_since_best >= patience:
            self.progress.stopped_early = True
        self._record(record)
        self._reporter.validation(self.name, record)


def trainable(model: AnyModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by name. Raises TrainingError if everything is frozen."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise TrainingError("nothing of this model is trainable: it was frozen; load it again, then add_adapter")
    return found
