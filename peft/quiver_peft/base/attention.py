"""The attention protocol that a base's layers call, and causal attention over whole sequences."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Scaled dot-product attention of new tokens to everything before them; may store the new keys and values."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [*, H, E]; k, v: [*, G, E] -> [*, H, E]."""
        ...


def window_mask(rows: Tensor, length: int, window: int) -> Tensor:
    """Sliding-window causal mask [N, length] bool: row i sees its position `rows[i]` and the window - 1 before it."""
    distance = rows[:, None] - torch.arange(length, device=rows.device)
    return (distance >= 0) & (distance < window)


class CausalAttention:
    """Whole sequences, padded on the right if at all: row s sees rows 0..s, so padding changes no real row.

    windows: how many tokens each layer looks back, itself included; () when no layer has a limit.
    """

    def __init__(self, windows: Sequence[int | None] = ()) -> None:
        self._windows = windows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, S, H, E]; k, v: [B, S, G, E] -> [B, S, H, E]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = self._windows[layer] if self._windows else None
        mask = None
        if window is not None and window < q.shape[2]:
            rows = torch.arange(q.shape[2], device=q.device)
            mask = window_mask(rows, q.shape[2], window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)
