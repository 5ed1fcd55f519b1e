"""Validation during training, and the best weights so far."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import nn

from quiver_peft.files.atomic_file import write_atomically
from quiver_peft.model import AnyModel
from quiver_peft.rounding import ceil_div
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import BatchLimits
from quiver_trainer.data.dataset import Dataset, evenly_spaced
from quiver_trainer.data.span_corruption import SpanCorruptor
from quiver_trainer.loop.metrics import GeneratedMetrics, ValidationMetrics, generated_metrics, validation_metrics
from quiver_trainer.recipe.config import EvaluationSection
from quiver_trainer.reports.progress import Progress, ValidationRecord


class Validator:
    """Computes the validation metrics. every: steps between validations."""

    def __init__(
        self,
        settings: EvaluationSection,
        data: Dataset,
        mender: SpanCorruptor | None,
        limits: BatchLimits,
        num_steps: int,
    ) -> None:
        mended = [sample if mender is None else mender(sample, i, 0) for i, sample in enumerate(data)]
        self.loss_samples = evenly_spaced(mended, settings.loss_samples)
        count = settings.exact_match_samples
        self.match_samples = evenly_spaced(mended, count) if count else []
        self.every = settings.interval_steps or max(1, ceil_div(num_steps, 5))
        self.max_new_tokens = settings.max_new_tokens
        self.overlap = settings.overlap
        self.limits = limits

    def measure(self, model: AnyModel, tokenizer: Tokenizer, progress: Progress) -> ValidationRecord:
        """The validation record of the model at this step."""
        started = time.perf_counter()
        metrics = self.loss_metrics(model)
        generated = self.generation_metrics(model, tokenizer) if self.match_samples else None
        progress.seconds += time.perf_counter() - started
        return ValidationRecord(
            progress.step,
            progress.tokens,
            round(progress.seconds, 3),
            metrics.loss,
            None if generated is None else generated.exact_match,
            metrics.token_accuracy,
            None if generated is None else generated.rouge_l,
            None if generated is None else generated.bleu,
        )

    def loss_metrics(self, model: AnyModel) -> ValidationMetrics:
        """Teacher-forced metrics on `loss_samples`."""
        return validation_metrics(model, self.loss_samples, self.limits)

    def generation_metrics(self, model: AnyModel, tokenizer: Tokenizer) -> GeneratedMetrics:
        """Metrics of greedy answers to `match_samples`."""
        return generated_metrics(model, tokenizer, self.match_samples, self.max_new_tokens, overlap=self.overlap)


class BestWeights(Protocol):
    """The trained parameters at the lowest validation loss, on disk so that a resumed run still has them."""

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Save these as the best so far."""
        ...

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best into these."""
        ...


class BestWeightsFile:
    """`BestWeights` in one safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Save these as the best so far."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        write_atomically(self._path, save_tensors(tensors))

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best into these."""
        for name, tensor in load_file(self._path).items():
            parameters[name].copy_(tensor)
