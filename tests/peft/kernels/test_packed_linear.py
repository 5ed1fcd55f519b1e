"""Packed weights: against torch's linear over many shapes, and a row's bits in any batch."""

import pytest
import torch
from torch import Tensor

from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.packed_linear import (
    PackedWeight,
    pack_weight,
    packed_linear,
    packed_linear_torch,
    packed_rows,
    packed_size,
)

SHAPES = [(1, 1), (5, 3), (16, 16), (17, 31), (40, 7), (64, 129), (100, 1100), (335, 64), (48, 2300)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25, 63, 300]


def packed(weight: Tensor) -> PackedWeight:
    return pack_weight(weight, torch.empty(packed_size(weight), dtype=weight.dtype))


def make(num_outputs: int, num_inputs: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias, input."""
    generator = torch.Generator().manual_seed(num_outputs * 10000 + num_inputs + num_rows)
    shapes = ((num_outputs, num_inputs), (num_outputs,), (num_rows, num_inputs))
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight, bias, x


def assert_same(found: Tensor, expected: Tensor, num_inputs: int) -> None:
    """Sums of n products of standard normal numbers, in another order."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6 * num_inputs**0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_number_of_rows(shape: tuple[int, int], with_bias: bool, cpp: Library) -> None:
    for num_rows in ROWS:
        weight, bias, x = make(*shape, num_rows)
        given_bias = bias if with_bias else None
        found = packed_linear(x, packed(weight), given_bias)
        assert_same(found, packed_linear_torch(x, packed(weight), given_bias), shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_form_is_torch_s_linear(shape: tuple[int, int]) -> None:
    weight, bias, x = make(*shape, 3)
    assert torch.equal(packed(weight).plain(), weight)
    assert torch.equal(packed_linear_torch(x, packed(weight), bias), torch.nn.functional.linear(x, weight, bias))


def test_both_ways_of_packing_give_the_same_panels(cpp: Library) -> None:
    weight, _, _ = make(37, 21, 1)
    by_cpp = packed(weight).panels
    with torch.enable_grad():  # which the compiled kernels leave to torch
        by_torch = packed(weight).panels
    assert torch.equal(by_cpp, by_torch)


@pytest.mark.parametrize("shape", [(17, 31), (100, 1100), (335, 64), (48, 2300)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(shape: tuple[int, int], cpp: Library) -> None:
    """Whatever the number of rows, its place among them, and the number of threads."""
    weight, bias, x = make(*shape, 300)
    panels = packed(weight)
    whole = packed_linear(x, panels, bias)
    for num_rows in ROWS:
        for start in (0, 1, 299 - num_rows):
            rows = slice(max(start, 0), max(start, 0) + num_rows)
            assert torch.equal(packed_linear(x[rows], panels, bias), whole[rows])
    cpp.set_num_threads(1)
    assert torch.equal(packed_linear(x, panels, bias), whole)


def test_inputs_in_any_form(cpp: Library) -> None:
    """Rows with gaps, transposed, with several leading dimensions, and none at all."""
    weight, bias, x = make(40, 24, 12)
    panels = packed(weight)
    expected = packed_linear(x, panels, bias)
    wide = torch.randn(12, 50)
    wide[:, 3:27] = x
    assert torch.equal(packed_linear(wide[:, 3:27], panels, bias), expected)
    assert torch.equal(packed_linear(x.T.contiguous().T, panels, bias), expected)
    assert torch.equal(packed_linear(x.view(3, 4, 24), panels, bias), expected.view(3, 4, 40))
    assert packed_linear(x[:0], panels, bias).shape == (0, 40)


def test_other_types_and_gradients_are_torch_s(cpp: Library) -> None:
    weight, _, x = make(20, 9, 4)
    panels = packed(weight)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        y = packed_linear(x, PackedWeight(panels.panels.clone(), panels.out_features), None)
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 9))


NARROW = [torch.bfloat16, torch.float16]


def narrow_weight(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Of every size that the type has, its smallest and largest numbers among them."""
    weight = make(num_outputs, num_inputs, 1)[0] * 10.0 ** torch.linspace(-6, 2, num_inputs)
    limits = torch.finfo(dtype)
    weight[0, 0], weight[-1, -1], weight[0, -1] = limits.smallest_normal / 4, -limits.max / 4, -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_narrow_weights_give_the_bits_of_the_same_weights_in_fp32(
    shape: tuple[int, int], dtype: torch.dtype, cpp: Library
) -> None:
    weight = narrow_weight(*shape, dtype)
    _, bias, _ = make(*shape, 1)
    for num_rows in ROWS:
        _, _, x = make(*shape, num_rows)
        assert torch.equal(packed_linear(x, packed(weight), bias), packed_linear(x, packed(weight.float()), bias))
        assert_same(
            packed_linear_torch(x, packed(weight), bias), torch.nn.functional.linear(x, weight.float(), bias), shape[1]
        )


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_weights_are_packed_alike_by_both_ways(dtype: torch.dtype, cpp: Library) -> None:
    weight = narrow_weight(37, 21, dtype)
    by_cpp = packed(weight).panels
    with torch.enable_grad():  # which the compiled kernels leave to torch
        by_torch = packed(weight).panels
    assert torch.equal(by_cpp, by_torch)
    assert torch.equal(packed(weight).plain(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_rows_of_a_packed_weight(dtype: torch.dtype, cpp: Library) -> None:
    weight = narrow_weight(37, 21, dtype)
    ids = torch.tensor([[0, 36, 15], [16, 17, 3]])
    by_cpp = packed_rows(packed(weight), ids)
    assert torch.equal(by_cpp, weight.float()[ids])
    with torch.enable_grad():
        assert torch.equal(packed_rows(packed(weight), ids), by_cpp)
    assert packed_rows(packed(weight), torch.tensor([37, -1])).isnan().all()
