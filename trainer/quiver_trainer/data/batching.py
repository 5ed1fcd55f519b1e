"""Batching: order, grouping by length, and the loss mask."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quiver_peft import T5
from quiver_peft.joint_forward import ModelInput
from quiver_peft.model import AnyModel
from quiver_trainer.data.jsonl import Sample

# Rows are sorted by length within so many batches: little padding in attention, and still another order in each epoch.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class Batch:
    """Model inputs of some samples, and the positions of the loss.

    positions: rows that predict a completion token, among the concatenated target sequences; targets: these tokens.
    num_tokens: prompts and completions.
    """

    inputs: ModelInput
    positions: list[int]
    targets: list[int]
    num_tokens: int

    @property
    def num_target_tokens(self) -> int:
        """Tokens of all target sequences."""
        return sum(map(len, self.inputs.written))


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch. tokens: padding included. A single row always makes a batch."""

    tokens: int | None
    rows: int | None

    def admit(self, num_rows: int, longest: int) -> bool:
        """Whether a batch of this shape is within both limits."""
        return (self.tokens is None or num_rows * longest <= self.tokens) and (
            self.rows is None or num_rows <= self.rows
        )


def plan_epoch(
    places: Iterable[int], lengths: Sequence[int], limits: BatchLimits, *, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of an epoch, as sample indices: shuffled, then grouped by similar length.

    lengths: tokens of each sample. Deterministic: the same arguments give the same plan on every machine.
    """
    # Text seeds are hashed whole, so that neighbouring seeds and epochs are unrelated.
    generator = random.Random(f"seed {seed}, epoch {epoch}")
    order = list(places)
    generator.shuffle(order)
    pool_size = _BATCHES_SORTED_TOGETHER * _typical_rows(lengths, limits)
    plan: list[list[int]] = []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda i: lengths[i])
        plan.extend(to_batches(pool, lengths, limits))
    generator.shuffle(plan)
    return plan


def to_batches(order: Iterable[int], lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Consecutive sample indices as batches within the limits."""
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


def sorted_by_length(samples: Sequence[Sample], limits: BatchLimits) -> Iterator[list[Sample]]:
    """Every sample once, in batches of similar length: the order of validation."""
    lengths = [len(sample.tokens) for sample in samples]
    for batch in to_batches(sorted(range(len(samples)), key=lambda i: lengths[i]), lengths, limits):
        yield [samples[i] for i in batch]


def collate(samples: Sequence[Sample], model: AnyModel) -> Batch:
    """Model inputs: a T5 encodes the prompt and decodes the completion, a GPT reads both as one sequence."""
    if isinstance(model, T5):
        start = model.base.config.start_token_id
        sources = [sample.tokens[: sample.num_prompt_tokens] for sample in samples]
        written = [[start, *sample.tokens[sample.num_prompt_tokens : -1]] for sample in samples]
        inputs, skipped = ModelInput(written, sources), [0] * len(samples)
    else:
        # The last token foretells nothing.
        inputs = ModelInput([sample.tokens[:-1] for sample in samples])
        skipped = [sample.num_prompt_tokens - 1 for sample in samples]
    positions: list[int] = []
    start_of_row = 0
    for row, num_skipped in zip(inputs.written, skipped, strict=True):
        positions += range(start_of_row + num_skipped, start_of_row + len(row))
        start_of_row += len(row)
    targets = [token for sample in samples for token in sample.tokens[sample.num_prompt_tokens :]]
    return Batch(inputs, positions, targets, num_tokens=sum(len(sample.tokens) for sample in samples))


def _typical_rows(lengths: Sequence[int], limits: BatchLimits) -> int:
    mean = sum(lengths) / len(lengths)
    bounds = [limits.rows, None if limits.tokens is None else int(limits.tokens / mean)]
    return max(1, min((bound for bound in bounds if bound is not None), default=len(lengths)))
