"""Progress of a run: counters, averages and records; all of its state that is not a tensor."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# About how many training records a run leaves, however long it is.
_TRAIN_RECORDS = 200
# Of the moving average of the loss, what stays from one step to the next.
_KEPT_LOSS = 0.95


@dataclass(frozen=True)
class TrainRecord:
    """Averages over the steps since the previous record. loss: nats per completion token. seconds: since the start."""

    step: int
    epoch: float
    tokens: int
    seconds: float
    train_loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class ValidationRecord:
    """Validation metrics after `step` steps. exact_match: share of rows; rouge_l, bleu: in [0, 1]; None if nothing was
    generated. token_accuracy: share of completion tokens that are the argmax."""

    step: int
    tokens: int
    seconds: float
    validation_loss: float
    exact_match: float | None
    token_accuracy: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None


@dataclass
class Progress:
    """Updated by the training loop after each step.

    step: steps done. epoch, batch: position of the next batch. tokens: trained on so far, without padding.
    seconds: training time, including validation and earlier parts of a resumed run.
    loss_sum, loss_tokens, window_tokens, window_seconds: since the last training record.
    smoothed_loss, lowest_loss: moving average of the training loss, and its minimum after warm-up.
    loss_scale, steps_at_scale: see `Run`, float16. best_step: step of the lowest validation loss.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    smoothed_loss: float = 0.0
    lowest_loss: float = math.inf
    loss_scale: float = 2.0**12
    steps_at_scale: int = 0
    best_step: int = 0
    stopped_early: bool = False
    train_records: list[TrainRecord] = field(default_factory=list[TrainRecord])
    validation_records: list[ValidationRecord] = field(default_factory=list[ValidationRecord])

    def add_step(self, loss: float, num_targets: int, num_tokens: int, num_batches: int, seconds: float) -> None:
        """Count a finished step."""
        self.step += 1
        self.batch += num_batches
        self.tokens += num_tokens
        self.window_tokens += num_tokens
        self.window_seconds += seconds
        self.seconds += seconds
        self.loss_sum += loss * num_targets
        self.loss_tokens += num_targets
        keep = min(1 - 1 / self.step, _KEPT_LOSS)
        self.smoothed_loss = keep * self.smoothed_loss + (1 - keep) * loss
        if self.step >= 1 / (1 - _KEPT_LOSS):
            self.lowest_loss = min(self.lowest_loss, self.smoothed_loss)

    @property
    def loss_rise(self) -> float:
        """How far the smoothed loss is above its minimum; 0 during warm-up."""
        return max(0.0, self.smoothed_loss - self.lowest_loss)

    @property
    def kept_validation(self) -> ValidationRecord | None:
        """The validation record of the best weights."""
        return next((record for record in self.validation_records if record.step == self.best_step), None)

    def add_validation(self, record: ValidationRecord) -> bool:
        """Append a record; returns whether its loss is the lowest so far."""
        best = min((r.validation_loss for r in self.validation_records), default=math.inf)
        self.validation_records.append(record)
        if record.validation_loss < best:
            self.best_step = record.step
        return record.validation_loss < best

    @property
    def measured_since_best(self) -> int:
        """Validations since the lowest loss."""
        return sum(record.step > self.best_step for record in self.validation_records)

    def close_window(self, epoch: float, learning_rate: float, gradient_norm: float) -> TrainRecord:
        """Append and return the record of the steps since the last one."""
        record = TrainRecord(
            step=self.step,
            epoch=round(epoch, 4),
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            train_loss=self.loss_sum / self.loss_tokens,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_second=round(self.window_tokens / max(self.window_seconds, 1e-9), 1),
        )
        self.train_records.append(record)
        self.loss_sum, self.loss_tokens, self.window_tokens, self.window_seconds = 0.0, 0, 0, 0.0
        return record

    def to_json(self) -> dict[str, Any]:
        """The state as JSON; floats round-trip exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Progress":
        """The inverse of `to_json`."""
        fields = dict(value)
        fields["train_records"] = [TrainRecord(**record) for record in value["train_records"]]
        fields["validation_records"] = [ValidationRecord(**record) for record in value["validation_records"]]
        return cls(**fields)


def record_interval(num_steps: int) -> int:
    """Steps from one training record to the next."""
    return max(1, num_steps // _TRAIN_RECORDS)


def to_jsonl(records: Sequence[TrainRecord | ValidationRecord]) -> str:
    """The records as JSON lines, ordered by step."""
    return "".join(json.dumps(asdict(record)) + "\n" for record in sorted(records, key=lambda r: r.step))
