"""Which samples go together in which order, and how a batch becomes tensors.

Shapes: B rows, S tokens of the longest row, R completion tokens of the whole batch.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_trainer.data import Sample

# Rows are sorted by length within so many batches: little padding, and still another order in each epoch.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, and where the loss is taken.

    tokens: [B, S]. sources: [R], positions in the flattened [B · S] whose next token is a completion token.
    targets: [R], those tokens. num_tokens: without padding.
    """

    tokens: Tensor
    sources: Tensor
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


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """The tensors of some samples. Padding is id 0: rows only look back, so nothing sees it."""
    lengths = [len(sample.tokens) for sample in samples]
    longest = max(lengths)
    padded: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for i, sample in enumerate(samples):
        sources += range(i * longest + sample.num_prompt_tokens - 1, i * longest + lengths[i] - 1)
        targets += sample.tokens[sample.num_prompt_tokens :]
        padded += sample.tokens
        padded += [0] * (longest - lengths[i])
    tokens = torch.tensor(padded).view(len(samples), longest)
    return Batch(
        tokens.to(device), torch.tensor(sources).to(device), torch.tensor(targets).to(device), num_tokens=sum(lengths)
    )


def _typical_rows(lengths: Sequence[int], limits: BatchLimits) -> int:
    """About how many rows a batch will have."""
    mean = sum(lengths) / len(lengths)
    bounds = [limits.rows, None if limits.tokens is None else int(limits.tokens / mean)]
    return max(1, min((bound for bound in bounds if bound is not None), default=len(lengths)))
