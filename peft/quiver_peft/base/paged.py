"""The paged KV cache and causal attention over it."""

import torch
from torch import Tensor

from quiver_peft.base.config import BaseConfig
from quiver_peft.kernels.huge_pages import empty_huge
from quiver_peft.kernels.paged_attention import paged_attention, write_kv
from quiver_peft.kernels.paged_layout import PagedLayout

__all__ = ["PagedAttention", "PagedKV", "PagedLayout"]


class PagedKV:
    """The KV cache of all layers, in blocks of `block_size` tokens that the scheduler allocates.

    keys, values: [L, num_blocks · block_size, G, E]; token `offset` of block `b` is row b · block_size + offset.
    """

    def __init__(
        self, config: BaseConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.windows = config.windows
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = empty_huge(shape, dtype, device).zero_()
        self.values = empty_huge(shape, dtype, device).zero_()

    @staticmethod
    def bytes_per_token(config: BaseConfig, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class PagedAttention:
    """Stores the new keys and values of a step, then attends each row to its own sequence and nothing else.

    bias: T5's by distance (`RelativeBias.bias_for_offsets`), added to scores that are then not scaled.
    """

    def __init__(self, kv: PagedKV, layout: PagedLayout, bias: Tensor | None = None) -> None:
        self._kv = kv
        self._layout = layout
        self._bias = bias
        self._scale = 1.0 if bias is not None else kv.keys.shape[-1] ** -0.5

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H, E]; k, v: [T, G, E] -> [T, H, E]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        write_kv(keys, values, k, v, self._layout.new_rows)
        window = self._kv.windows[layer] if self._kv.windows else None
        return paged_attention(q, keys, values, self._layout, scale=self._scale, window=window, bias=self._bias)
