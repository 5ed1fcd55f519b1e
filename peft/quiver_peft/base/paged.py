"""A paged key-value cache: where each token's keys and values lie, and the attention that reads them there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.base.attention import window_mask
from quiver_peft.base.config import BaseConfig
from quiver_peft.base.t5_attention import RelativeBias


class PagedKV:
    """The cache of all layers: blocks of `block_size` tokens, handed out by whoever schedules.

    keys, values: [L, num_blocks · block_size, G, E]; token `offset` of block `b` is row b · block_size + offset.
    """

    def __init__(
        self, config: BaseConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.windows = config.windows
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_token(config: BaseConfig, dtype: torch.dtype) -> int:
        """What one token takes over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one sequence: rows [start, end) of the batch attend causally to the cache rows `cached`."""

    start: int
    end: int
    cached: Tensor  # [S] int64
    mask: Tensor | None  # [end - start, S] bool; None when the chunk is the whole sequence

    def within(self, window: int | None) -> Tensor | None:
        """The mask of a layer that looks back `window` tokens."""
        length, num_new = self.cached.shape[0], self.end - self.start
        if window is None or length <= window:
            return self.mask
        rows = torch.arange(length - num_new, length, device=self.cached.device)
        return window_mask(rows, length, window)

    def biased(self, bias: RelativeBias) -> Tensor:
        """The scores' bias, -inf for what comes later, [H, end - start, S]."""
        positions = torch.arange(self.cached.shape[0], device=self.cached.device)
        distances = positions - positions[self.start - self.end :, None]
        return bias(distances).masked_fill(distances > 0, -torch.inf)


@dataclass(frozen=True)
class Singles:
    """Sequences with one new token each, attended to together."""

    rows: Tensor  # [B] int64, rows of the batch
    cached: Tensor  # [B, S] int64, cache rows, padded
    mask: Tensor  # [B, 1, 1, S] bool
    lengths: Tensor  # [B] int64, tokens of each sequence

    def within(self, window: int | None) -> Tensor:
        """The mask of a layer that looks back `window` tokens."""
        longest = self.cached.shape[1]
        if window is None or longest <= window:
            return self.mask
        first = self.lengths[:, None, None, None] - window
        return self.mask & (torch.arange(longest, device=self.mask.device) >= first)

    def biased(self, bias: RelativeBias) -> Tensor:
        """The scores' bias, -inf for padding, [B, H, 1, S]."""
        positions = torch.arange(self.cached.shape[1], device=self.cached.device)
        scores = bias(positions - (self.lengths[:, None] - 1)).transpose(0, 1)[:, :, None]
        return scores.masked_fill(~self.mask, -torch.inf)


class PagedLayout:
    """Where the tokens of one step lie. Sequences follow one another in the packed batch, B of them, T rows in all."""

    def __init__(
        self,
        query_lengths: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> None:
        """query_lengths: new tokens of each sequence; context_lengths: all its tokens, the new ones included."""
        new_rows: list[Tensor] = []
        singles: list[tuple[int, Tensor]] = []
        self.chunks: list[Chunk] = []
        row = 0
        for num_new, length, table in zip(query_lengths, context_lengths, block_tables, strict=True):
            cached = cache_rows(table, length, block_size)
            new_rows.append(cached[length - num_new :])
            if num_new == 1:
                singles.append((row, cached))
            else:
                self.chunks.append(_chunk(row, num_new, cached.to(device)))
            row += num_new
        self.new_rows = torch.cat(new_rows).to(device)  # [T]
        self.singles = pad_singles(singles, device) if singles else None


def cache_rows(table: Sequence[int], length: int, block_size: int) -> Tensor:
    """The cache rows of a sequence's first `length` tokens, [length]."""
    blocks = torch.tensor(table, dtype=torch.int64)
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:length]


def _chunk(start: int, num_new: int, cached: Tensor) -> Chunk:
    length = cached.shape[0]
    mask = None
    if num_new != length:
        ones = torch.ones(num_new, length, dtype=torch.bool, device=cached.device)
        mask = ones.tril(length - num_new)
    return Chunk(start, start + num_new, cached, mask)


def pad_singles(singles: Sequence[tuple[int, Tensor]], device: torch.device) -> Singles:
    longest = max(cached.shape[0] for _, cached in singles)
    rows = torch.tensor([row for row, _ in singles])
    lengths = torch.tensor([cached.shape[0] for _, cached in singles])
    padded = torch.stack([F.pad(cached, (0, longest - cached.shape[0])) for _, cached in singles])
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    return Singles(rows.to(device), padded.to(device), mask.to(device), lengths.to(device))


class PagedAttention:
    """Stores the new keys and values of a step, then attends each row to its own sequence and nothing else.

    bias: T5's, added to scores that are then not scaled.
    """

    def __init__(self, kv: PagedKV, layout: PagedLayout, bias: RelativeBias | None = None) -> None:
        self._kv = kv
        self._layout = layout
        self._scale = None if bias is None else 1.0
        self._chunk_masks: list[Tensor] | None = None
        self._single_mask: Tensor | None = None
        if bias is not None:
            # The same in all layers.
            self._chunk_masks = [chunk.biased(bias) for chunk in layout.chunks]
            self._single_mask = None if layout.singles is None else layout.singles.biased(bias)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H, E]; k, v: [T, G, E] -> [T, H, E]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        keys[self._layout.new_rows] = k
        values[self._layout.new_rows] = v
        out = torch.empty_like(q)
        window = self._kv.windows[layer] if self._kv.windows else None
        for i, chunk in enumerate(self._layout.chunks):
            rows, mask = slice(chunk.start, chunk.end), chunk.within(window)
            if self._chunk_masks is not None:
                mask = self._chunk_masks[i]
            causal = mask is None
            out[rows] = attend_chunk(q[rows], keys[chunk.cached], values[chunk.cached], mask, causal, self._scale)
        if (singles := self._layout.singles) is not None:
            mask = singles.within(window) if self._single_mask is None else self._single_mask
            cached = singles.cached
            out[singles.rows] = attend_singles(q[singles.rows], keys[cached], values[cached], mask, self._scale)
        return out


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """q: [N, H, E]; k, v: [S, G, E]; mask: [N, S] or [H, N, S] -> [N, H, E]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def attend_singles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """q: [B, H, E]; k, v: [B, S, G, E]; mask: [B, 1 or H, 1, S] -> [B, H, E].

    The query heads that share a key-value head stand where tokens would: no key is read twice or repeated.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).flatten(1, 2)
