"""Norm, activations and rotary positions: the compiled kernels against their plain forms."""

import pytest
import torch

from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.elementwise import (
    Activation,
    activate,
    activate_torch,
    add,
    apply_rope,
    apply_rope_torch,
    argmax_finite,
    argmax_finite_torch,
    embedding,
    layer_norm,
    layer_norm_torch,
    rms_norm,
    rms_norm_torch,
    rope_cos_sin,
    rope_cos_sin_torch,
)

SIZES = [(1, 1), (3, 7), (8, 640), (5, 65), (300, 100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm(size: tuple[int, int], cpp: Library) -> None:
    x, weight = torch.randn(size) * 3, torch.randn(size[1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))
    assert torch.equal(rms_norm(x[-1:], weight, 1e-5), rms_norm(x, weight, 1e-5)[-1:])


def test_norm_of_heads_between_others(cpp: Library) -> None:
    fused, weight = torch.randn(9, 5 * 64), torch.randn(64)
    x = fused[:, 64:256].unflatten(1, (3, 64))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_layer_norm(size: tuple[int, int], offset: float, cpp: Library) -> None:
    x, weight, bias = torch.randn(size) * 3 + 5, torch.randn(size[1]), torch.randn(size[1])
    found = layer_norm(x, weight, bias, 1e-5, offset)
    torch.testing.assert_close(found, layer_norm_torch(x, weight, bias, 1e-5, offset), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer_norm(x[-1:], weight, bias, 1e-5, offset), found[-1:])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_look_up_and_sum(size: tuple[int, int], cpp: Library) -> None:
    table, ids = torch.randn(11, size[1]), torch.randint(11, (size[0],))
    rows = embedding(table, ids, torch.float32)
    assert torch.equal(rows, table[ids])
    assert embedding(table, torch.tensor([11, -1]), torch.float32).isnan().all(), "no memory but the table's is read"
    x = torch.randn(size)
    assert torch.equal(add(x, rows), x + rows)
    assert torch.equal(add(x.T, rows.T), (x + rows).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_narrow_embedding_are_widened(dtype: torch.dtype, cpp: Library) -> None:
    table = torch.randn(11, 37).to(dtype)
    ids = torch.tensor([3, 10, 0])
    by_cpp = embedding(table, ids, torch.float32)
    assert torch.equal(by_cpp, table[ids].float())
    with torch.enable_grad():  # which the compiled kernels leave to torch
        assert torch.equal(embedding(table, ids, torch.float32), by_cpp)


def test_angles(cpp: Library) -> None:
    positions, frequencies = torch.tensor([0, 1, 77, 4095, 131071]), 10000.0 ** -(torch.arange(16) / 16)
    for found, expected in zip(
        rope_cos_sin(positions, frequencies, 1.25), rope_cos_sin_torch(positions, frequencies, 1.25), strict=True
    ):
        assert found.shape == (5, 1, 32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["silu", "relu", "relu2", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations(kind: Activation, gated: bool, cpp: Library) -> None:
    for rows, width in SIZES:
        x = torch.randn(rows, 2 * width if gated else width) * 5
        found = activate(kind, x, gated=gated)
        torch.testing.assert_close(found, activate_torch(kind, x, gated=gated), rtol=1e-5, atol=1e-5)


def test_activations_far_from_zero(cpp: Library) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, -87.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4, torch.nan]])
    kinds: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
    for kind in kinds:
        found = activate(kind, x, gated=False)
        torch.testing.assert_close(found, activate_torch(kind, x, gated=False), equal_nan=True)


def test_exact_gelu_is_as_accurate_as_torch(cpp: Library) -> None:
    x = torch.linspace(-12, 12, 100_001)[None]
    exact = activate_torch("gelu", x.double(), gated=False)
    error = (activate("gelu", x, gated=False) - exact).abs()
    torchs_error = (activate_torch("gelu", x, gated=False) - exact).abs()
    assert error.max() <= 2 * torchs_error.max()
    assert error.mean() <= 2 * torchs_error.mean()


@pytest.mark.parametrize("dim", [2, 8, 10, 64])
def test_rotation_of_a_whole_head_and_of_a_part(dim: int, cpp: Library) -> None:
    angles = torch.randn(9, 1, dim // 2)
    angles = torch.cat((angles, angles), -1)
    fused = torch.randn(9, 5 * 64)
    x = fused[:, 64:256].unflatten(1, (3, 64))
    before = fused.clone()
    torch.testing.assert_close(
        apply_rope(x, angles.cos(), angles.sin()), apply_rope_torch(x, angles.cos(), angles.sin())
    )
    assert torch.equal(fused, before), "the input stays as it is"


@pytest.mark.parametrize("size", [*SIZES, (32, 8192)], ids=str)
def test_the_best_of_each_row(size: tuple[int, int], cpp: Library) -> None:
    x = torch.randint(-4, 4, size).float() if size[1] < 1000 else torch.randn(size)
    expected = [row.index(max(row)) for row in x.tolist()]  # the first of equal ones
    assert argmax_finite(x).tolist() == expected
    for value in (torch.nan, torch.inf):
        x[-1, size[1] // 2] = value
        assert argmax_finite(x).tolist() == argmax_finite_torch(x).tolist() == [*expected[:-1], -1]
    x[0] = -torch.inf
    assert argmax_finite(x)[0] == argmax_finite_torch(x)[0] == -1
