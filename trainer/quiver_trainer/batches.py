"""Which samples go together in which order, and how a batch becomes tensors.

Shapes: B rows, S tokens of the longest row, R completion tokens of the whole batch.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_peft import T5
from quiver_peft.base.t5 import T5Base
from quiver_peft.model import AnyModel
from quiver_trainer.data import Sample

# Rows are sorted by length within so many batches: little padding, and still another order in each epoch.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, and where the loss is taken.

    inputs: what the model's `hidden` takes: tokens [B, S] of a GPT; source [B, S], target [B, N] and source lengths
        [B] of a T5. positions: [R], in its flattened output: those whose next token is a completion token.
    targets: [R], those tokens. num_tokens: without padding.
    """

    inputs: tuple[Tensor, ...]
    positions: Tensor
    targets: Tensor
    num_tokens: int


@dataclass(frozen=True)
class BatchLimits:
    """A batch is closed before it exceeds either. tokens: padding included. A single row is always a batch."""

    tokens: int | None
    rows: int | None

    def admit(self, num_rows: int, longest: int) -> bool:
        """Whether so many rows of so many tokens each are within both."""
        return (self.tokens is None or num_rows * longest <= self.tokens) and (
            self.rows is None or num_rows <= self.rows
        )


def plan_epoch(lengths: Sequence[int], limits: BatchLimits, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as positions of samples: shuffled, each of rows of like length.

    The same arguments give the same plan, on every machine.
    """
    # Text seeds are hashed whole, so that neighbouring seeds and epochs are unrelated.
    generator = random.Random(f"seed {seed}, epoch {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    pool_size = _BATCHES_SORTED_TOGETHER * _typical_rows(lengths, limits)
    plan: list[list[int]] = []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda i: lengths[i])
        plan.extend(cut(pool, lengths, limits))
    generator.shuffle(plan)
    return plan


def cut(order: Iterable[int], lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Consecutive positions as batches within the limits."""
    batch: list[int] = []
    longest = 0
    for i in order:
        if batch and not limits.admit(len(batch) + 1, max(longest, lengths[i])):
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, lengths[i])
    if batch:
        yield batch


def by_length(samples: Sequence[Sample], limits: BatchLimits) -> Iterator[list[Sample]]:
    """All samples once, in batches of like length: for measuring."""
    lengths = [len(sample.tokens) for sample in samples]
    for batch in cut(sorted(range(len(samples)), key=lambda i: lengths[i]), lengths, limits):
        yield [samples[i] for i in batch]


def collate(samples: Sequence[Sample], model: AnyModel) -> Batch:
    """The tensors of some samples, on the model's device. Padding is id 0: nothing sees it."""
    inputs, positions = _source_and_target(samples, model.base) if isinstance(model, T5) else _whole_rows(samples)
    targets = [token for sample in samples for token in sample.tokens[sample.num_prompt_tokens :]]
    device = model.base.embedding.weight.device
    return Batch(
        tuple(tensor.to(device) for tensor in inputs),
        torch.tensor(positions).to(device),
        torch.tensor(targets).to(device),
        num_tokens=sum(len(sample.tokens) for sample in samples),
    )


def _whole_rows(samples: Sequence[Sample]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Prompt and completion as one row: it only looks back."""
    tokens = _pad([sample.tokens for sample in samples])
    longest = tokens.shape[1]
    positions: list[int] = []
    for i, sample in enumerate(samples):
        positions += range(i * longest + sample.num_prompt_tokens - 1, i * longest + len(sample.tokens) - 1)
    return (tokens,), positions


def _source_and_target(samples: Sequence[Sample], base: T5Base) -> tuple[tuple[Tensor, ...], list[int]]:
    """The prompt as source, the completion as target, one token late behind the start token."""
    sources = [sample.tokens[: sample.num_prompt_tokens] for sample in samples]
    targets = [[base.config.start_token_id, *sample.tokens[sample.num_prompt_tokens : -1]] for sample in samples]
    padded = _pad(targets)
    positions = [i * padded.shape[1] + j for i, target in enumerate(targets) for j in range(len(target))]
    return (_pad(sources), padded, torch.tensor([len(source) for source in sources])), positions


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _typical_rows(lengths: Sequence[int], limits: BatchLimits) -> int:
    """About how many rows a batch will have."""
    mean = sum(lengths) / len(lengths)
    bounds = [limits.rows, None if limits.tokens is None else int(limits.tokens / mean)]
    return max(1, min((bound for bound in bounds if bound is not None), default=len(lengths)))
