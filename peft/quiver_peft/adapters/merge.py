"""Folding an adapter into its base's weights: LoRA, DoRA and IA3 are linear in them; other methods are not."""

import torch

from quiver_peft.adapters.methods.dora import magnitude_ratio
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError

MERGEABLE = ("lora", "ia3")


@torch.no_grad()
def merge_into(base: Base, weights: AdapterWeights) -> None:
    """Change the base's weights, in place, so that it answers as it did with the adapter.

    LoRA: W + s B A; DoRA: g (W + s B A); IA3: rows of W and bias times l, or columns of W where the input is scaled.
    Raises AdapterError, and changes nothing, when a method cannot be folded in.
    """
    for method in weights.methods:
        if method not in MERGEABLE:
            raise AdapterError(
                f"method {method!r} cannot be merged: it is no change of weights; {' and '.join(MERGEABLE)} can be"
            )
    linears = {linear.site.name: linear for linear in base.linears()}
    for item in weights.lora:
        linear = linears[item.target.site]
        rows = slice(*item.target.rows)
        a, b = item.a.to(linear.weight.device), item.b.to(linear.weight.device)
        # Before the sum: the gate is of the unmerged weights.
        scale = None
        if item.magnitude is not None:
            scale, _ = magnitude_ratio(linear, item.target, a, b, item.scale, item.magnitude.to(a.device))
        merged = linear.weight[rows].float() + item.scale * (b @ a)
        linear.weight[rows] = (merged if scale is None else merged * scale[:, None]).to(linear.weight.dtype)
    for item in weights.ia3:
        linear, scale = linears[item.target.site], item.scale.to(linears[item.target.site].weight)
        if item.on_input:
            linear.weight.mul_(scale)
            continue
        rows = slice(*item.target.rows)
        linear.weight[rows].mul_(scale[:, None])
        if linear.bias is not None:
            linear.bias[rows].mul_(scale)
