"""How a base attends: the protocol its layers call, and plain causal attention over whole sequences."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Scaled dot-product attention of new tokens to everything before them; may store the new keys and values."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [*, H, E]; k, v: [*, G, E] -> [*, H, E]."""
        ...


class CausalAttention:
    """Whole sequences, padded on the right if at all: row s sees rows 0..s, so padding changes no real row."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, S, H, E]; k, v: [B, S, G, E] -> [B, S, H, E]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
