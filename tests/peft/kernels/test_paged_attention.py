"""Attention over cache blocks: both forms against the formula, and a row's bits in any batch and any chunk."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.paged_attention import paged_attention, paged_attention_torch, write_kv
from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.rounding import ceil_div

CPU = torch.device("cpu")
# Query heads, key heads, head size: plain, shared, all shared, and sizes that fill no register.
HEADS = [(4, 4, 16), (10, 5, 64), (8, 1, 24), (3, 3, 5), (2, 2, 80), (12, 4, 100)]


@dataclass
class Case:
    """Some sequences in a scattered cache."""

    q: Tensor
    keys: Tensor
    values: Tensor
    layout: PagedLayout


def make(heads: tuple[int, int, int], new: list[int], lengths: list[int], block_size: int = 4, seed: int = 0) -> Case:
    num_heads, num_kv_heads, size = heads
    generator = torch.Generator().manual_seed(seed)
    needed = [ceil_div(length, block_size) for length in lengths]
    blocks = list(range(sum(needed) + 3))
    random.Random(seed).shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    shape = ((sum(needed) + 3) * block_size, num_kv_heads, size)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    q = torch.randn(sum(new), num_heads, size, generator=generator) * 2
    return Case(q, keys, values, PagedLayout(new, lengths, tables, block_size, CPU))


def formula(
    case: Case, scale: float, causal: bool = True, window: int | None = None, bias: Tensor | None = None
) -> Tensor:
    """Row by row and head by head, in fp64."""
    out = torch.empty_like(case.q)
    group = case.q.shape[1] // case.keys.shape[1]
    row = 0
    for sequence, (num_new, length) in enumerate(zip(case.layout.query_lengths, case.layout.lengths, strict=True)):
        cached = case.layout.cache_rows(sequence)
        for position in range(length - num_new, length):
            first = 0 if window is None else max(position - window + 1, 0)
            last = position + 1 if causal else length
            seen = torch.arange(first, last)
            for head in range(case.q.shape[1]):
                k, v = (part[cached[seen], head // group].double() for part in (case.keys, case.values))
                scores = scale * (k @ case.q[row, head].double())
                if bias is not None:
                    limit = bias.shape[1] // 2
                    scores += bias[head, (seen - position).clamp(-limit, limit) + limit]
                out[row, head] = (scores.softmax(0) @ v).float()
            row += 1
    return out


def both(case: Case, scale: float, causal: bool, window: int | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the compiled kernel, and in the plain form."""
    parts = case.q, case.keys, case.values, case.layout
    found = paged_attention(*parts, scale=scale, causal=causal, window=window, bias=bias)
    return found, paged_attention_torch(*parts, scale, causal, window, bias)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_steps_and_chunks(heads: tuple[int, int, int], window: int | None, cpp: Library) -> None:
    case = make(heads, [1, 9, 1, 70, 3, 1], [1, 9, 66, 140, 200, 64])
    expected = formula(case, 0.3, window=window)
    for found in both(case, 0.3, True, window, None):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_relative_bias(causal: bool, cpp: Library) -> None:
    bias = torch.randn(4, 2 * 20 + 1, generator=torch.Generator().manual_seed(1)) * 3
    lengths = [1, 33, 130] if causal else [5, 33, 130]
    case = make((4, 4, 16), [1, 33, 7] if causal else lengths, lengths)
    expected = formula(case, 1.0, causal, bias=bias)
    for found in both(case, 1.0, causal, None, bias):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_see_a_whole_other_sequence(cpp: Library) -> None:
    """A decoder's rows and their source: more rows than tokens too."""
    case = make((4, 2, 16), [1, 5, 9], [40, 5, 3])
    expected = torch.cat(
        [
            formula(make_one(case, sequence, row), 0.5, causal=False)
            for sequence, rows in enumerate(((0,), range(1, 6), range(6, 15)))
            for row in rows
        ]
    )
    for found in both(case, 0.5, False, None, None):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def make_one(case: Case, sequence: int, row: int) -> Case:
    """One row alone on its sequence."""
    table = case.layout.tables[sequence].tolist()
    length = case.layout.lengths[sequence]
    layout = PagedLayout([1], [length], [table], case.layout.block_size, CPU)
    return Case(case.q[row : row + 1], case.keys, case.values, layout)


@pytest.mark.parametrize("window", [None, 50])
def test_a_row_has_the_same_bits_in_any_batch_and_chunk(window: int | None, cpp: Library) -> None:
    """One sequence's last rows: with others before and after it, in chunks of every kind, row by row."""
    heads, length = (10, 5, 64), 150
    case = make(heads, [length], [length])
    parts = case.keys, case.values

    def attend(q: Tensor, layout: PagedLayout) -> Tensor:
        return paged_attention(q, *parts, layout, scale=0.125, window=window)

    whole = attend(case.q, case.layout)
    table = case.layout.tables[0].tolist()
    for chunk in (1, 2, 3, 16, 17, 64, 100):
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            layout = PagedLayout([end - start], [end], [table], 4, CPU)
            assert torch.equal(attend(case.q[start:end], layout), whole[start:end]), (chunk, start)
    tables = [table[::-1], table, table[:5]]
    layout = PagedLayout([3, 1, 20], [100, length, 20], tables, 4, CPU)
    q = torch.cat([torch.randn(3, 10, 64), case.q[-1:], torch.randn(20, 10, 64)])
    assert torch.equal(attend(q, layout)[3], whole[-1])
    cpp.set_num_threads(1)
    assert torch.equal(attend(case.q, case.layout), whole)


def test_what_lies_outside_is_not_read(cpp: Library) -> None:
    """Other blocks, and what comes later in a sequence's last block, hold NaN."""
    case = make((4, 2, 16), [1, 6], [30, 6])
    used = torch.cat([case.layout.cache_rows(sequence) for sequence in (0, 1)])
    keys, values = (torch.full_like(part, torch.nan) for part in (case.keys, case.values))
    keys[used], values[used] = case.keys[used], case.values[used]
    found = paged_attention(case.q, keys, values, case.layout, scale=0.25)
    assert torch.equal(found, paged_attention(case.q, case.keys, case.values, case.layout, scale=0.25))


def test_queries_with_gaps_between_rows(cpp: Library) -> None:
    """Views into the output of a fused linear, as the base gives them."""
    case = make((4, 2, 16), [1, 6], [30, 6])
    fused = torch.randn(7, 8 * 16)
    fused[:, : 4 * 16] = case.q.flatten(1)
    q = fused[:, : 4 * 16].unflatten(1, (4, 16))
    expected = paged_attention(case.q, case.keys, case.values, case.layout, scale=0.25)
    assert torch.equal(paged_attention(q, case.keys, case.values, case.layout, scale=0.25), expected)


def test_large_scores(cpp: Library) -> None:
    """Softmax of scores whose exponentials would overflow, and of far smaller ones beside them."""
    case = make((4, 2, 16), [1, 90], [100, 90])
    case.q.mul_(100)
    found, plain = both(case, 1.0, True, None, None)
    assert found.isfinite().all()
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


def test_rows_are_stored_where_the_layout_says(cpp: Library) -> None:
    case = make((4, 2, 16), [1, 6], [30, 6])
    fused = torch.randn(7, 4 * 16)
    k, v = (part.unflatten(1, (2, 16)) for part in fused.split(32, 1))
    keys, values = case.keys.clone(), case.values.clone()
    write_kv(keys, values, k, v, case.layout.new_rows)
    case.keys[case.layout.new_rows], case.values[case.layout.new_rows] = k, v
    assert torch.equal(keys, case.keys)
    assert torch.equal(values, case.values)
    assert case.layout.new_rows.tolist() == [
        case.layout.cache_rows(0)[-1].item(),
        *case.layout.cache_rows(1).tolist(),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_narrow_keys_and_values_give_the_bits_of_the_same_ones_in_fp32(
    heads: tuple[int, int, int], dtype: torch.dtype, cpp: Library
) -> None:
    case = make(heads, [1, 9, 1, 70, 3, 1], [1, 9, 66, 140, 200, 64])
    keys, values = case.keys.to(dtype), case.values.to(dtype)
    by_cpp = paged_attention(case.q, keys, values, case.layout, scale=0.3)
    assert torch.equal(by_cpp, paged_attention(case.q, keys.float(), values.float(), case.layout, scale=0.3))
    expected = formula(Case(case.q, keys.float(), values.float(), case.layout), 0.3)
    by_torch = paged_attention_torch(case.q, keys, values, case.layout, 0.3, True, None, None)
    for found in (by_cpp, by_torch):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_are_rounded_as_torch_rounds(dtype: torch.dtype, cpp: Library) -> None:
    k = torch.randn(6, 2, 24) * 10.0 ** torch.linspace(-9, 3, 24)
    k[0, 0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1 + 2**-9, 1 + 3 * 2**-9])
    v, rows = -k.flip(0), torch.tensor([7, 0, 3, 11, 5, 1])
    keys, values = (torch.zeros(12, 2, 24, dtype=dtype) for _ in range(2))
    write_kv(keys, values, k, v, rows)
    for cache, new in ((keys, k), (values, v)):
        expected = torch.zeros_like(cache)
        expected[rows] = new.to(dtype)
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(cache.isnan(), expected.isnan())
