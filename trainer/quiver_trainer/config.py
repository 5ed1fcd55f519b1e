"""What a training run is told: one frozen, validated tree of settings, each with its meaning."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from quiver_trainer.method_config import AnyMethodSection, Section

DEFAULT_BATCH_TOKENS = 4096
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DataSection(Section):
    """The rows to learn from and to measure on."""

    train: Path = Field(description='JSONL file of {"prompt": ..., "completion": ...} rows to learn from')
    validation: Path | None = Field(default=None, description="JSONL file of rows to measure on; null: no validation")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="most tokens of a row, prompt and completion together; null: what the base can take",
    )
    too_long: Literal["error", "skip"] = Field(
        default="error", description="longer rows: stop (error) or leave them out and say how many (skip); none is cut"
    )


class OptimiserSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="the peak of the schedule; null: 2e-4, but 1e-3 for ptuning, 5e-3 for ia3, 1e-2 for prefix, 3e-2 "
        "for prompt_tuning; of several methods the lowest",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="for matrices; norms, biases and virtual tokens are not decayed"
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="decay of the two running moments, each in [0, 1)"
    )
    epsilon: float = Field(default=1e-8, gt=0, description="added to the denominator")
    max_gradient_norm: float | None = Field(
        default=1.0, gt=0, description="longer gradients are scaled to it; null: never"
    )

    @field_validator("betas")
    @classmethod
    def _are_decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be in [0, 1)")
        return betas


class ScheduleSection(Section):
    """How the learning rate goes from step to step."""

    kind: Literal["cosine", "constant"] = Field(
        default="cosine", description="after warm-up: down to zero, or as it is"
    )
    warmup_fraction: float = Field(
        default=0.05, ge=0, le=1, description="share of all steps in which the rate rises linearly"
    )


class EvaluationSection(Section):
    """Measuring on the validation rows; always also before the first and after the last step."""

    interval_steps: int | None = Field(
        default=None, ge=1, description="steps from one to the next; null: a fifth of the run"
    )
    loss_samples: int | None = Field(
        default=256, ge=1, description="validation rows for the loss, spread evenly over the file; null: all"
    )
    exact_match_samples: int = Field(
        default=64, ge=0, description="validation rows whose completion is generated greedily and compared; 0: none"
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most tokens to generate for each; null: as the longest completion among them needs",
    )


class TrainConfig(Section):
    """One training run. Without `adapter` the whole base is fine-tuned, and a Hugging Face folder is written."""

    base: Path = Field(description="Hugging Face folder of the base model")
    output: Path = Field(description="folder to write; its name is the adapter's id when it is served")
    adapter: tuple[AnyMethodSection, ...] | None = Field(
        default=None,
        description="the method to train, or a list of them; null: fine-tune the whole base. A recipe must say which",
    )
    data: DataSection = Field(description="the rows to learn from and to measure on")
    epochs: int = Field(default=3, ge=1, description="passes over the training rows")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever epochs says")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most tokens of a batch, padding included; null: 4096 unless batch_size is given",
    )
    batch_size: int | None = Field(default=None, ge=1, description="most rows of a batch; null: no such limit")
    optimiser: OptimiserSection = Field(default=OptimiserSection(), description="AdamW")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="the learning rate from step to step")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="measuring on the validation rows")
    checkpoint_interval_steps: int = Field(
        default=100, ge=1, description="a killed run goes on from the last checkpoint"
    )
    seed: int = Field(default=0, ge=0, description="of the adapter's first weights, the order of the rows, and dropout")
    device: str = Field(
        default="auto", pattern=r"auto|cpu|cuda(:\d+)?", description="auto (CUDA if there), cpu, cuda, cuda:1"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the frozen base; an adapter is always trained in float32"
    )

    @field_validator("adapter")
    @classmethod
    def _at_least_one(cls, value: tuple[AnyMethodSection, ...] | None) -> tuple[AnyMethodSection, ...] | None:
        if value == ():
            raise ValueError("an empty list trains nothing; write null to fine-tune the whole base")
        return value

    @field_validator("output")
    @classmethod
    def _can_be_an_id(cls, output: Path) -> Path:
        if not _FOLDER_NAME.fullmatch(output.name):
            raise ValueError(f"the folder's name must match {_FOLDER_NAME.pattern}, as adapter ids do")
        return output

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.adapter is None and self.dtype != "float32":
            raise ValueError(f"dtype {self.dtype} would lose small updates of the whole base; use float32")
        return self

    @property
    def token_budget(self) -> int | None:
        """Most tokens of a batch, or None when only the rows are limited."""
        if self.batch_tokens is None and self.batch_size is None:
            return DEFAULT_BATCH_TOKENS
        return self.batch_tokens
