"""LoRA with gradients: adds the products of many adapters, each on its own rows, to a linear's output in place.

Shapes: T rows, K inputs and N outputs of the linear, R rank of a part, M outputs that the part adapts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LoraPart(NamedTuple):
    """One pair of factors at a linear. rows: of the batch; columns: of its output. a: [R, K], b: [M, R]."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    scale: float
    a: Tensor
    b: Tensor


def add_lora_(y: Tensor, x: Tensor, parts: Sequence[LoraPart]) -> Tensor:
    """y[rows, columns] += scale · (x[rows] Aᵀ) Bᵀ for each part; y is changed and returned. x: [T, K], y: [T, N].

    y must not be needed by an earlier operation's backward pass, as a linear's output is not.
    """
    places = [(part.rows, part.columns, part.scale) for part in parts]
    return _AddLora.apply(y, x, places, *(factor for part in parts for factor in (part.a, part.b)))  # pyright: ignore[reportReturnType]


class _AddLora(torch.autograd.Function):
    """One autograd node for all parts, where plain operations need eight for each. Saves x and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, places: Any, *factors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        low_ranks: list[Tensor] = []
        for (rows, columns, scale), a, b in zip(places, factors[::2], factors[1::2], strict=True):
            low_rank = x[slice(*rows)].to(a.dtype) @ a.T
            _add_product_(y[slice(*rows), slice(*columns)], low_rank, b.T, scale)
            low_ranks.append(low_rank)
        ctx.mark_dirty(y)
        ctx.places = places
        ctx.save_for_backward(x, *factors, *low_ranks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *rest = ctx.saved_tensors
        num_parts = len(ctx.places)
        factors, low_ranks = rest[: 2 * num_parts], rest[2 * num_parts :]
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        of_factors: list[Tensor] = []
        for (rows, columns, scale), a, b, low_rank in zip(
            ctx.places, factors[::2], factors[1::2], low_ranks, strict=True
        ):
            of_product = gradient[slice(*rows), slice(*columns)].to(a.dtype)
            of_low_rank = (of_product @ b).mul_(scale)
            of_factors += [of_low_rank.T @ x[slice(*rows)].to(a.dtype), (of_product.T @ low_rank).mul_(scale)]
            if of_x is not None:
                _add_product_(of_x[slice(*rows)], of_low_rank, a, 1.0)
        return (gradient, of_x, None, *of_factors)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale · left @ right, in the factors' type where it differs."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_(((left @ right) * scale).to(out.dtype))
