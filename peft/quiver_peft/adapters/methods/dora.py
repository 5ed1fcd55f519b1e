"""DoRA (Liu et al. 2024): the length of each row of W + s B A is trained apart, as a magnitude m.

    y = g · (x Wᵀ + s (x Aᵀ) Bᵀ) + bias,   g = m / ‖W + s B A‖ over each row

so that on what a linear and its LoRA give, bias included, it is a scale g and a shift (1 - g) bias.
"""

import torch
from torch import Tensor

from quiver_peft.adapters.methods.targets import Target
from quiver_peft.base.sites import Linear


def weight_norms(linear: Linear, target: Target) -> Tensor:
    """‖W‖ of each row of the target, [N] fp32: the magnitudes that DoRA starts with."""
    return torch.linalg.vector_norm(_rows(linear.plain_weight(), target).float(), dim=1)


def magnitude_ratio(
    linear: Linear, target: Target, a: Tensor, b: Tensor, lora_scale: float, magnitude: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scale g and shift (1 - g) bias, both [N] where `a` is; no shift without a bias. a: [R, K], b: [N, R]."""
    with torch.no_grad():
        # The paper's section 4.3: the length counts as a constant, which saves most of the memory of training.
        lengths = linear.row_norms(target.rows, lora_scale * (b @ a))
        # A row of zeros has no direction: it stays zero, where 0 / 0 would spread over everything.
        lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)
    scale = magnitude / lengths
    if linear.bias is None:
        return scale, None
    return scale, (1 - scale) * _rows(linear.bias, target).to(a.device, torch.float32)


def _rows(tensor: Tensor, target: Target) -> Tensor:
    return tensor.detach()[target.rows[0] : target.rows[1]]
