"""LoRA added in place equals LoRA by plain operations: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.kernels.lora_training import LoraPart, add_lora_

WIDTH_IN, WIDTH_OUT, ROWS = 12, 20, 11
# rows, columns, rank, scale: two adapters share the batch, one has two parts at the linear, some rows have none.
PLACES = [((0, 4), (0, 20), 3, 1.5), ((6, 11), (0, 8), 2, 0.5), ((6, 11), (8, 20), 5, 2.0)]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[LoraPart]]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH_IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(WIDTH_OUT, WIDTH_IN, dtype=dtype)
    parts = [
        LoraPart(rows, columns, scale, nn.Parameter(torch.randn(rank, WIDTH_IN)), nn.Parameter(torch.randn(n, rank)))
        for (rows, columns, rank, scale), n in zip(PLACES, (20, 8, 12), strict=True)
    ]
    return x, weight, parts


def plain(x: Tensor, weight: Tensor, parts: list[LoraPart]) -> Tensor:
    y = F.linear(x, weight)
    for part in parts:
        product = part.scale * (x[slice(*part.rows)].float() @ part.a.T) @ part.b.T
        (first, last), (left, right) = part.rows, part.columns
        y = y + F.pad(product, (left, WIDTH_OUT - right, first, ROWS - last)).to(y.dtype)
    return y


@pytest.mark.parametrize("input_learns", [True, False])
def test_values_and_gradients_are_those_of_plain_operations(input_learns: bool) -> None:
    x, weight, parts = tensors()
    x.requires_grad_(input_learns)
    leaves = [factor for part in parts for factor in (part.a, part.b)] + [x] * input_learns
    expected = plain(x, weight, parts)
    gradient = torch.randn_like(expected)
    of_plain = torch.autograd.grad(expected, leaves, gradient)
    y = F.linear(x, weight)
    ours = add_lora_(y, x, parts)
    assert ours.data_ptr() == y.data_ptr(), "nothing as large as the output is made anew"
    torch.testing.assert_close(ours, expected)
    for actual, wanted in zip(torch.autograd.grad(ours, leaves, gradient), of_plain, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert (expected[4:6] - F.linear(x, weight)[4:6]).abs().max() == 0


def test_a_bfloat16_base_keeps_fp32_factors() -> None:
    x, weight, parts = tensors(torch.bfloat16)
    expected = plain(x, weight, parts)
    ours = add_lora_(F.linear(x, weight), x, parts)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0.02)
    ours.float().sum().backward()
    assert all(part.a.grad is not None and part.a.grad.dtype == torch.float32 for part in parts)
