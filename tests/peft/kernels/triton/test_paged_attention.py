"""The Triton attention kernels against their torch twin."""

import random
from typing import Any

import pytest
import torch
from support.triton_twins import assert_twins
from torch import Tensor

from quiver_peft.kernels.paged_attention import paged_attention_torch
from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.kernels.triton.paged_attention import SPLIT_TOKENS, paged_attention_triton
from quiver_peft.rounding import ceil_div

LIMIT = 6


class Case:
    """Sequences whose keys and values are scattered over blocks, among numbers that must not be read."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
    ) -> None:
        """lengths: (new rows, context) of each sequence. heads: of queries, of keys and values."""
        blocks = list(range(sum(ceil_div(context, block_size) for _, context in lengths) + 2))
        random.Random(0).shuffle(blocks)
        shape = (len(blocks) * block_size, heads[1], head_dim)
        tables = [[blocks.pop() for _ in range(ceil_div(context, block_size))] for _, context in lengths]
        queries, contexts = zip(*lengths, strict=True)
        self.layout = PagedLayout(queries, contexts, tables, block_size, device)
        # The queries are a part of a fused projection.
        fused = torch.randn(sum(queries), 2 * heads[0], head_dim, device=device)
        self.q = fused.to(dtype)[:, : heads[0]]
        self.keys, self.values = (torch.full(shape, 50.0, device=device).to(dtype) for _ in range(2))
        for sequence in range(len(lengths)):
            rows = self.layout.cache_rows(sequence)
            for cache in (self.keys, self.values):
                cache[rows] = torch.randn(len(rows), *shape[1:], device=device).to(dtype)

    def run(self, bias: Tensor | None = None, window: int | None = None, causal: bool = True) -> tuple[Tensor, Tensor]:
        """What the kernel found and what the twin did."""
        scale = self.q.shape[-1] ** -0.5 if bias is None else 1.0
        arguments: Any = (self.q, self.keys, self.values, self.layout, scale, causal, window, bias)
        return paged_attention_triton(*arguments), paged_attention_torch(*arguments)


MIXED = [(1, 3), (5, 20), (1, 70), (40, 40), (1, 1), (33, 90)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((3, 3), 80), ((6, 1), 96), ((8, 2), 128)])
def test_heads_of_many_shapes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case([(1, 9), (6, 22), (1, 1)], heads=heads, head_dim=head_dim, dtype=dtype, device=device)
    assert_twins(*case.run(), dtype)


@pytest.mark.parametrize("window", [None, 1, 7, 30, 100])
def test_chunks_and_single_rows_with_and_without_a_window(window: int | None, device: torch.device) -> None:
    assert_twins(*Case(MIXED, device=device).run(window=window), torch.float32)


@pytest.mark.parametrize("window", [None, 40, SPLIT_TOKENS + 30])
def test_a_context_of_several_splits(window: int | None, device: torch.device) -> None:
    lengths = [(1, SPLIT_TOKENS), (1, 2 * SPLIT_TOKENS + 5), (1, 4), (2, 30), (1, SPLIT_TOKENS + 1)]
    assert_twins(*Case(lengths, block_size=16, device=device).run(window=window), torch.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_t5s_bias(causal: bool, device: torch.device) -> None:
    """Causal in its decoder; in its encoder every row sees its whole source."""
    bias = torch.randn(4, 2 * LIMIT + 1, device=device)
    lengths = MIXED if causal else [(n, n) for n, _ in MIXED]
    assert_twins(*Case(lengths, heads=(4, 4), device=device).run(bias, causal=causal), torch.float32)


def test_cross_attention(device: torch.device) -> None:
    """A decoder's rows see the whole source, which may have fewer tokens than they are."""
    lengths = [(1, 30), (5, 3), (40, 1), (1, 1), (2, 70)]
    assert_twins(*Case(lengths, device=device).run(causal=False), torch.float32)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """To the last bit: the splits of a context follow from its length alone."""
    alone = Case([(1, SPLIT_TOKENS - 9)], device=device)
    longer = Case([(1, SPLIT_TOKENS - 9), (1, 2 * SPLIT_TOKENS), (3, 9)], device=device)
    longer.q[0] = alone.q[0]
    for name in ("keys", "values"):
        getattr(longer, name)[longer.layout.cache_rows(0)] = getattr(alone, name)[alone.layout.cache_rows(0)]
    assert torch.equal(longer.run()[0][0], alone.run()[0][0])
