"""Rearranges a base's weights for the processor that will serve it."""

import torch
from torch import Tensor, nn

from quiver_peft.base.base import Base
from quiver_peft.kernels.huge_pages import empty_huge
from quiver_peft.kernels.packed_linear import can_pack, pack_weight, packed_size


@torch.no_grad()
def pack(base: Base) -> None:
    """Pack every linear and the head; nothing where that brings nothing. The base can then no longer be trained.

    Packed weights take the place of the plain ones, one after another: memory never holds two of all. A tied head is
    packed beside the embedding, whose rows are still looked up.
    """
    linears = list(base.linears())
    head = base.head_weight
    if not all(can_pack(weight) for weight in (head, *(linear.weight for linear in linears))):
        return
    sizes = [packed_size(linear.weight) for linear in linears]
    memory = empty_huge([sum(sizes) + packed_size(head)], head.dtype, head.device)
    *pieces, last = memory.split([*sizes, packed_size(head)])
    for linear, piece in zip(linears, pieces, strict=True):
        linear.packed = pack_weight(linear.weight, piece)
        linear.weight = _empty_weight(linear.weight)
    base.packed_head = pack_weight(head, last)
    if base.head is not None:
        base.head.weight = _empty_weight(head)


def _empty_weight(like: Tensor) -> nn.Parameter:
    """In place of a weight that is packed: whoever uses it fails by its shape."""
    return nn.Parameter(like.new_empty(0), requires_grad=False)
