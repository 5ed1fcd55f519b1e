"""T5's attention over whole sequences, for training and tests: relative position bias, no scale."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """A number for each head and bucket of distances, added to attention scores; shared by the layers of a stack.

    Raffel et al. 2020, section 2.1. Near distances have a bucket each, far ones share logarithmically wider ones.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(num_buckets, num_heads), std=0.02))
        self.max_distance = max_distance
        self._bidirectional = bidirectional
        self._num_buckets = num_buckets
        self._buckets: Tensor | None = None

    def forward(self, distances: Tensor) -> Tensor:
        """distances: position of the key less that of the query, [*] int64 -> [H, *]."""
        return self.weight[self.bucket(distances)].movedim(-1, 0)

    def bias_for_offsets(self) -> Tensor:
        """The bias of distances -max_distance ... max_distance, [H, 2 · max_distance + 1] fp32.

        Farther keys have the bias of the outermost distances.
        """
        limit = self.max_distance
        return self(torch.arange(-limit, limit + 1, device=self.weight.device)).float().contiguous()

    def bucket(self, distances: Tensor) -> Tensor:
        """Which row of the weight a distance takes. [*] int64 -> [*] int64."""
        if self._buckets is None or self._buckets.device != distances.device:
            # Made on first use: a base is constructed on the meta device.
            self._buckets = self._all_buckets().to(distances.device)
        limit = self.max_distance
        return self._buckets[distances.clamp(-limit, limit) + limit]

    def _all_buckets(self) -> Tensor:
        """The bucket of every distance from -max_distance to max_distance."""
        distances = torch.arange(-self.max_distance, self.max_distance + 1)
        per_side = self._num_buckets // 2 if self._bidirectional else self._num_buckets
        ahead = (distances > 0) & self._bidirectional
        length = distances.abs() if self._bidirectional else (-distances).clamp(min=0)
        num_exact = per_side // 2
        # The same operations in fp32 as transformers `T5Attention._relative_position_bucket`: edges round alike.
        wide = torch.log(length.float() / num_exact) / math.log(self.max_distance / num_exact)
        far = (num_exact + (wide * (per_side - num_exact)).long()).clamp(max=per_side - 1)
        return torch.where(length < num_exact, length, far) + ahead * per_side


class Sources(Protocol):
    """The keys and values of the encoder's output, kept for the decoder's cross-attention."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [*, H, E]."""
        ...

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """Attention of decoder rows to their sources. q: [*, H, E] -> [*, H, E]."""
        ...


def padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """Additive mask: 0 for real tokens, -inf for padding, [B, 1, 1, S]. lengths: [B]."""
    padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(padding.shape, device=lengths.device).masked_fill(padding, -torch.inf)[:, None, None]


class BiasedAttention:
    """Whole sequences [B, S], one forward pass: the bias is computed in the first layer and shared.

    lengths: [B], real tokens of each row, for the encoder, whose rows see one another; None: causal.
    """

    def __init__(self, bias: RelativeBias, lengths: Tensor | None = None) -> None:
        self._bias = bias
        self._lengths = lengths
        self._mask: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [B, S, H, E] -> [B, S, H, E]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self._mask is None:
            self._mask = self._make_mask(q.shape[2], q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, scale=1.0).transpose(1, 2)

    def _make_mask(self, length: int, device: torch.device) -> Tensor:
        positions = torch.arange(length, device=device)
        distances = positions - positions[:, None]
        scores = self._bias(distances)
        if self._lengths is None:
            return scores.masked_fill(distances > 0, -torch.inf)
        return scores + padding_mask(self._lengths, length)


class WholeSources:
    """Sources [B, S] of a whole forward pass, padded on the right. lengths: [B], real tokens of each."""

    def __init__(self, lengths: Tensor) -> None:
        self._lengths = lengths
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [B, S, H, E]."""
        self._kept[layer] = k, v

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: [B, N, H, E] -> [B, N, H, E]."""
        k, v = self._kept[layer]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = padding_mask(self._lengths, k.shape[2]).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2)
