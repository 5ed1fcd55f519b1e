"""Norm, activations and rotary positions: the compiled kernels against their plain forms."""

import pytest
import torch

from quiver_peft.kernels.elementwise import (
    Activation,
    activate,
    activate_torch,
    rms_norm,
    rms_norm_torch,
    rotate,
    rotate_torch,
)
from quiver_peft.kernels.native.library import Library

SIZES = [(1, 1), (3, 7), (8, 640), (5, 65), (300, 100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm(size: tuple[int, int], native: Library) -> None:
    x, weight = torch.randn(size) * 3, torch.randn(size[1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))
    assert torch.equal(rms_norm(x[-1:], weight, 1e-5), rms_norm(x, weight, 1e-5)[-1:])


@pytest.mark.parametrize("kind", ["silu", "relu", "relu2", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations(kind: Activation, gated: bool, native: Library) -> None:
    for rows, width in SIZES:
        x = torch.randn(rows, 2 * width if gated else width) * 5
        found = activate(kind, x, gated=gated)
        torch.testing.assert_close(found, activate_torch(kind, x, gated=gated), rtol=1e-5, atol=1e-5)


def test_activations_far_from_zero(native: Library) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, -87.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4, torch.nan]])
    for kind in ("silu", "gelu_tanh"):
        found = activate(kind, x, gated=False)
        torch.testing.assert_close(found, activate_torch(kind, x, gated=False), equal_nan=True)


@pytest.mark.parametrize("dim", [2, 8, 10, 64])
def test_rotation_of_a_whole_head_and_of_a_part(dim: int, native: Library) -> None:
    angles = torch.randn(9, 1, dim // 2)
    angles = torch.cat((angles, angles), -1)
    fused = torch.randn(9, 5 * 64)
    x = fused[:, 64:256].unflatten(1, (3, 64))
    before = fused.clone()
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), rotate_torch(x, angles.cos(), angles.sin()))
    assert torch.equal(fused, before), "the input stays as it is"
