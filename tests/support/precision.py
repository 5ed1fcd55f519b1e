"""Bounds for fp32 results: a few times what fp32 itself loses, measured on the oracle.

The oracle is computed twice, in fp32 and in float64. How far these two lie apart is what rounding costs this
computation on this processor, whatever its instructions and threads; a correct result in fp32 lies as far from the
float64 one, within a small factor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TIMES = 8.0  # another order of sums, other fused operations, and luck
_FLOOR = 8 * torch.finfo(torch.float32).eps  # where the oracle's own error happens to be nothing


def relative_loss(in_fp32: Sequence[Tensor], in_fp64: Sequence[Tensor]) -> float:
    """The largest error of the oracle in fp32, of any tensor, over that tensor's largest number."""
    losses = [
        ((single.double() - double).abs().max() / double.abs().max().clamp_min(1e-30)).item()
        for single, double in zip(in_fp32, in_fp64, strict=True)
    ]
    return max(losses)


def assert_as_exact_as_fp32(
    found: Sequence[Tensor], in_fp32: Sequence[Tensor], in_fp64: Sequence[Tensor], *, times: float = TIMES
) -> None:
    """Each tensor lies within `times` the oracle's own loss of the float64 oracle, relative to its largest number."""
    allowed = times * relative_loss(in_fp32, in_fp64) + _FLOOR
    for i, (ours, double) in enumerate(zip(found, in_fp64, strict=True)):
        assert ours.shape == double.shape, (i, ours.shape, double.shape)
        scale = double.abs().max().clamp_min(1e-30)
        error = ((ours.double() - double).abs().max() / scale).item()
        assert error <= allowed, f"tensor {i} is off by {error:.2g} of its largest number; allowed is {allowed:.2g}"
