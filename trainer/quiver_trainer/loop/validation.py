"""What a run is measured on while it trains, and its best weights so far."""

import time
from collections.abc import Mapping
from pathlib import Path

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
    """Validation samples. every: steps from one measurement to the next."""

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
        """How good the model is now."""
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
        """On the samples for the loss."""
        return validation_metrics(model, self.loss_samples, self.limits)

    def generation_metrics(self, model: AnyModel, tokenizer: Tokenizer) -> GeneratedMetrics:
        """On the samples that are answered."""
        return generated_metrics(model, tokenizer, self.match_samples, self.max_new_tokens, overlap=self.overlap)


class BestWeights:
    """The trained parameters at the lowest validation loss, in a file: an interrupted run still knows them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """These are the best so far."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        write_atomically(self._path, save_tensors(tensors))

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the model what it was then."""
        for name, tensor in load_file(self._path).items():
            parameters[name].copy_(tensor)
