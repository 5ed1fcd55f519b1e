"""Validation metrics: loss and token accuracy on completions, exact match, ROUGE and BLEU of generated answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.adapters.training.training_seam import RngScope
from quiver_peft.joint_forward import joint_hidden
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import Batch, BatchLimits, collate, sorted_by_length
from quiver_trainer.data.jsonl import Sample
from quiver_trainer.loop.predict import is_exact_match, predict_tokens


def completion_losses(
    models: Sequence[AnyModel], batches: Sequence[Batch], drawing: Sequence[RngScope] | None = None
) -> list[Tensor]:
    """Mean cross-entropy of each batch's completion tokens, in nats, all from one forward pass; scalars.

    models: on one base, one for each batch. drawing: see `TrainingSeam`.
    """
    logits, targets = _completion_logits(models, batches, drawing)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return [own.mean() for own in losses.split([len(batch.targets) for batch in batches])]


def _completion_logits(
    models: Sequence[AnyModel], batches: Sequence[Batch], drawing: Sequence[RngScope] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of completion tokens [R, V] and these tokens [R], those of the first batch first.

    Other rows are skipped: most of a batch is prompt, and the vocabulary is wide.
    """
    hidden = joint_hidden(models, [batch.inputs for batch in batches], drawing)
    positions: list[int] = []
    num_rows = 0
    for batch in batches:
        positions += [num_rows + position for position in batch.positions]
        num_rows += batch.num_target_tokens
    logits = models[0].base.logits(hidden.index_select(0, torch.tensor(positions, device=hidden.device)))
    targets = torch.tensor([token for batch in batches for token in batch.targets], device=hidden.device)
    return logits.float(), targets


def completion_loss(model: AnyModel, batch: Batch) -> Tensor:
    return completion_losses([model], [batch])[0]


@dataclass(frozen=True)
class ValidationMetrics:
    """Teacher-forced. loss: mean cross-entropy of completion tokens, nats. token_accuracy: share that is the argmax."""

    loss: float
    token_accuracy: float


@torch.inference_mode()
def validation_metrics(model: AnyModel, samples: Sequence[Sample], limits: BatchLimits) -> ValidationMetrics:
    """Metrics over all completion tokens of the samples, without dropout."""
    total, right, count = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for rows in sorted_by_length(samples, limits):
        batch = collate(rows, model)
        logits, targets = _completion_logits([model], [batch])
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        count += len(batch.targets)
    model.train(was_training)
    return ValidationMetrics(total / count, right / count)


@dataclass(frozen=True)
class GeneratedMetrics:
    """Metrics of greedy answers. exact_match: share equal to the completion after stripping white space.
    rouge_l (its F1, mean over answers) and bleu (of all answers, as SacreBLEU counts): in [0, 1], where asked for."""

    exact_match: float
    rouge_l: float | None
    bleu: float | None


def generated_metrics(
    model: AnyModel,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    max_new_tokens: int | None,
    *,
    overlap: bool = False,
) -> GeneratedMetrics:
    """max_new_tokens: None generates enough for the longest completion and its end. overlap: ROUGE and BLEU too."""
    if max_new_tokens is None:
        max_new_tokens = max(len(sample.tokens) - sample.num_prompt_tokens for sample in samples)
    prompts = [sample.tokens[: sample.num_prompt_tokens] for sample in samples]
    answers = predict_tokens(model, prompts, max_new_tokens=max_new_tokens)
    predicted = [tokenizer.decode(answer) for answer in answers]
    wanted = [tokenizer.decode(sample.tokens[sample.num_prompt_tokens :]) for sample in samples]
    return compare_texts(predicted, wanted, overlap=overlap)


def compare_texts(predicted: Sequence[str], wanted: Sequence[str], *, overlap: bool) -> GeneratedMetrics:
    """One reference for each prediction. overlap: ROUGE and BLEU too."""
    right = [is_exact_match(ours, theirs) for ours, theirs in zip(predicted, wanted, strict=True)]
    share = sum(right) / len(right)
    if not overlap:
        return GeneratedMetrics(share, None, None)
    # Here and not above: it takes seconds to import.
    from torchmetrics.functional.text import rouge_score, sacre_bleu_score

    rouge = rouge_score(list(predicted), list(wanted), rouge_keys=("rougeL",))
    bleu = sacre_bleu_score(list(predicted), [[text] for text in wanted])
    return GeneratedMetrics(share, rouge["rougeL_fmeasure"].item(), bleu.item())


def exact_match(model: AnyModel, tokenizer: Tokenizer, samples: Sequence[Sample], max_new_tokens: int | None) -> float:
    """The share of samples whose completion the model generates greedily."""
    return generated_metrics(model, tokenizer, samples, max_new_tokens).exact_match
