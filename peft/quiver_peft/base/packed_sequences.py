"""Packed sequences for training: the tokens of all sequences concatenated, [T, *], without padding.

Linears, norms and adapters work on packed rows; only attention pads to [B, S].
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from quiver_peft.base.attention import Attend
from quiver_peft.base.t5_attention import Sources


class PackedSequences:
    """Index between B sequences and T packed rows. lengths: [B]. positions: [T], of each row in its sequence."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self._shape = len(lengths), max(lengths)
        starts = torch.tensor([end - length for end, length in zip(accumulate(lengths), lengths, strict=True)])
        rows = torch.arange(sum(lengths))
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.positions = (rows - starts[sequences]).to(device)
        is_ragged = min(lengths) < max(lengths)
        self._places = (sequences.to(device) * max(lengths) + self.positions) if is_ragged else None

    def to_padded(self, x: Tensor) -> Tensor:
        """[T, *] -> [B, S, *], zero-padded on the right."""
        if self._places is None:
            return x.unflatten(0, self._shape)
        num_sequences, longest = self._shape
        padded = x.new_zeros(num_sequences * longest, *x.shape[1:])
        return padded.index_copy(0, self._places, x).unflatten(0, self._shape)

    def from_padded(self, x: Tensor) -> Tensor:
        """[B, S, *] -> [T, *]."""
        flat = x.flatten(0, 1)
        return flat if self._places is None else flat.index_select(0, self._places)


class PackedSelfAttention:
    """Self-attention on packed rows: pads, attends within each sequence, and packs the result."""

    def __init__(self, attend: Attend, sequences: PackedSequences) -> None:
        self._attend = attend
        self._sequences = sequences

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H, E]; k, v: [T, G, E] -> [T, H, E]."""
        pad = self._sequences.to_padded
        return self._sequences.from_padded(self._attend(layer, pad(q), pad(k), pad(v)))


class PackedCrossAttention:
    """Cross-attention on packed rows: each target sequence attends to its own source."""

    def __init__(self, sources: Sources, source: PackedSequences, target: PackedSequences) -> None:
        self._sources = sources
        self._source = source
        self._target = target

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [T, H, E], rows of the sources."""
        self._sources.store(layer, self._source.to_padded(k), self._source.to_padded(v))

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, H, E], rows of the targets -> [T, H, E]."""
        return self._target.from_padded(self._sources(layer, self._target.to_padded(q)))
