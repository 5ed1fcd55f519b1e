"""The configuration of a training run: a frozen, validated tree of settings with descriptions."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from quiver_trainer.recipe.methods import METHOD_SECTIONS, AnyMethodSection, Section

DEFAULT_BATCH_TOKENS = 4096
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class WeightedFile(Section):
    """One of several files of rows."""

    path: Path = Field(description="JSONL file")
    weight: float = Field(default=1.0, gt=0, description="how often an epoch passes over it; fractions draw anew")


class DataSection(Section):
    """Training and validation data."""

    train: Path | tuple[WeightedFile, ...] = Field(
        description='JSONL file of rows to learn from, {"prompt": ..., "completion": ...}, {"prompt_tokens": [...], '
        '"completion_tokens": [...]} {"messages": [...]} or {"text": ...}; or a list of {path: ..., weight: ...}'
    )
    validation: Path | None = Field(default=None, description="JSONL file of rows to measure on; null: no validation")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="most tokens of a row, prompt and completion together; null: what the base can take",
    )
    too_long: Literal["error", "skip"] = Field(
        default="error", description="longer rows: stop (error) or leave them out and say how many (skip); none is cut"
    )

    @property
    def train_files(self) -> tuple[WeightedFile, ...]:
        return (WeightedFile(path=self.train),) if isinstance(self.train, Path) else self.train

    @field_validator("train")
    @classmethod
    def _at_least_one_file(cls, value: Path | tuple[WeightedFile, ...]) -> Path | tuple[WeightedFile, ...]:
        if value == ():
            raise ValueError("an empty list holds nothing to learn from")
        return value


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float | dict[str, float] | None = Field(
        default=None,
        description="the peak of the schedule, or {method: its own}; null: 2e-4, but 1e-3 for ptuning, 5e-3 for ia3, "
        "1e-2 for prefix, 3e-2 for prompt_tuning",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="for matrices; norms, biases, scales and virtual tokens are not decayed"
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="decay of the two running moments, each in [0, 1)"
    )
    epsilon: float = Field(default=1e-8, gt=0, description="added to the denominator")
    max_gradient_norm: float | None = Field(
        default=1.0, gt=0, description="longer gradients are scaled to it; null: never"
    )

    @field_validator("learning_rate")
    @classmethod
    def _are_rates(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        rates = value if isinstance(value, dict) else {} if value is None else {"lora": value}
        if unknown := set(rates) - set(METHOD_SECTIONS):
            raise ValueError(f"{', '.join(unknown)}: should be among {', '.join(METHOD_SECTIONS)}")
        if not all(rate > 0 for rate in rates.values()):
            raise ValueError("should be greater than 0")
        return value

    @field_validator("betas")
    @classmethod
    def _are_decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be in [0, 1)")
        return betas


class ScheduleSection(Section):
    """Learning-rate schedule."""

    kind: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="after warm-up: down along half a cosine or a line, or as it is"
    )
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="share of the peak at the end of a way down")
    warmup_fraction: float = Field(
        default=0.05, ge=0, le=1, description="share of all steps in which the rate rises linearly"
    )


class EvaluationSection(Section):
    """Validation; it always also runs before the first and after the last step."""

    interval_steps: int | None = Field(
        default=None, ge=1, description="steps from one to the next; null: a fifth of the run"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop when so many measurements in a row brought no lower validation loss; null: never",
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="write the weights of the last step, or those of the lowest validation loss"
    )
    loss_samples: int | None = Field(
        default=256, ge=1, description="validation rows for the loss, spread evenly over the file; null: all"
    )
    exact_match_samples: int = Field(
        default=64, ge=0, description="validation rows whose completion is generated greedily and compared; 0: none"
    )
    overlap: bool = Field(default=False, description="of the generated rows also ROUGE-L and BLEU")
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most tokens to generate for each; null: as the longest completion among them needs",
    )


class ParallelSection(Section):
    """Parallel layout under torchrun; the remaining factor of the processes is data parallelism."""

    tensor: int = Field(
        default=1,
        ge=1,
        description="processes over which the base and its adapter are cut; each further group of so many trains on "
        "its share of every batch. Above 1: start with torchrun",
    )
    sequence: bool = Field(
        default=False,
        description="also cut the tokens between the linears over the processes of tensor: less memory for activations",
    )
    pipeline: int = Field(default=1, description="must be 1: layers are not dealt over processes; use tensor")

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.pipeline != 1:
            raise ValueError(
                f"pipeline parallelism is not offered (pipeline: {self.pipeline}): a base is one module from embedding "
                "to head, and a T5's decoder needs its encoder's output in every layer; use tensor"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence cuts tokens over the processes of tensor; set tensor above 1")
        return self


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
    accumulation: int = Field(
        default=1, ge=1, description="batches of one step: larger steps in the memory of one batch"
    )
    checkpoint_activations: bool = Field(
        default=False, description="compute what is inside of layers twice instead of keeping it: less memory, slower"
    )
    max_loss_rise: float | None = Field(
        default=3.0,
        gt=0,
        description="stop when the smoothed training loss is so many nats above its lowest; null: never",
    )
    optimizer: OptimizerSection = Field(default=OptimizerSection(), description="AdamW")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="the learning rate from step to step")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="measuring on the validation rows")
    checkpoint_interval_steps: int = Field(
        default=100, ge=1, description="a killed run goes on from the last checkpoint"
    )
    tensorboard: Path | None = Field(
        default=None, description="folder of event files for TensorBoard, one folder below it for each run; null: none"
    )
    seed: int = Field(default=0, ge=0, description="of the adapter's first weights, the order of the rows, and dropout")
    device: str = Field(
        default="auto", pattern=r"auto|cpu|cuda(:\d+)?", description="auto (CUDA if there), cpu, cuda, cuda:1"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="type of the frozen base; an adapter is always trained in float32"
    )

    parallel: ParallelSection = Field(default=ParallelSection(), description="over several processes")

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
        if self.data.validation is None and (self.evaluation.patience or self.evaluation.keep == "best"):
            raise ValueError("evaluation.patience and evaluation.keep: best need data.validation to measure on")
        return self

    @property
    def token_budget(self) -> int | None:
        """Most tokens of a batch; None if only rows are limited."""
        if self.batch_tokens is None and self.batch_size is None:
            return DEFAULT_BATCH_TOKENS
        return self.batch_tokens
