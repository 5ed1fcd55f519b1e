"""How good a model is on validation rows: its loss on the completions, and how many it generates exactly."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.adapters.joint_seam import Drawing
from quiver_peft.joint_forward import joint_hidden
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.batches import Batch, BatchLimits, by_length, collate
from quiver_trainer.data import Sample
from quiver_trainer.predict import is_exact_match, predict_tokens


def completion_losses(
    models: Sequence[AnyModel], batches: Sequence[Batch], drawing: Sequence[Drawing] | None = None
) -> list[Tensor]:
    """Mean cross-entropy of each batch's completion tokens, in nats, all from one forward pass; scalars.

    models: on one base, one for each batch. drawing: see `JointSeam`.
    Logits are computed for completion tokens alone: most rows of a batch are prompt, and the vocabulary is wide.
    """
    hidden = joint_hidden(models, [batch.inputs for batch in batches], drawing)
    positions: list[int] = []
    num_rows = 0
    for batch in batches:
        positions += [num_rows + position for position in batch.positions]
        num_rows += batch.num_written
    logits = models[0].base.logits(hidden.index_select(0, torch.tensor(positions, device=hidden.device)))
    targets = torch.tensor([token for batch in batches for token in batch.targets], device=hidden.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return [own.mean() for own in losses.split([len(batch.targets) for batch in batches])]


def completion_loss(model: AnyModel, batch: Batch) -> Tensor:
    """Of one model."""
    return completion_losses([model], [batch])[0]


@torch.inference_mode()
def validation_loss(model: AnyModel, samples: Sequence[Sample], limits: BatchLimits) -> float:
    """Mean cross-entropy over all completion tokens of the samples, in nats, without dropout."""
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    for rows in by_length(samples, limits):
        batch = collate(rows, model)
        total += completion_loss(model, batch).item() * len(batch.targets)
        count += len(batch.targets)
    model.train(was_training)
    return total / count


def exact_match(model: AnyModel, tokenizer: Tokenizer, samples: Sequence[Sample], max_new_tokens: int | None) -> float:
    """The share of samples whose completion the model generates greedily, white space around it aside.

    max_new_tokens: None generates just enough for the longest completion and the end token.
    """
    if max_new_tokens is None:
        max_new_tokens = max(len(sample.tokens) - sample.num_prompt_tokens for sample in samples)
    prompts = [sample.tokens[: sample.num_prompt_tokens] for sample in samples]
    answers = predict_tokens(model, prompts, max_new_tokens=max_new_tokens)
    right = [
        is_exact_match(tokenizer.decode(answer), sample.row.completion or "")
        for answer, sample in zip(answers, samples, strict=True)
    ]
    return sum(right) / len(right)
