"""`pack`: rearranges a base's weights into the layout of the compiled CPU kernels."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from quiver_peft.base.base import Base
from quiver_peft.kernels.huge_pages import empty_huge
from quiver_peft.kernels.packed_linear import can_pack, pack_weight, packed_size


@torch.no_grad()
def pack(base: Base) -> None:
    """Packs every linear and the head, in place; does nothing where packing brings no speed.

    A packed base cannot be trained. Weights are replaced one at a time, so the peak memory is the base and one weight.
    A tied head is packed once; the embedding looks its rows up in it.
    """
    linears = list(base.linears())
    head = base.head_weight
    if base.compute_dtype != torch.float32:
        return
    if not all(can_pack(weight) for weight in (head, *(linear.weight for linear in linears))):
        return
    memory = _allocate([*(linear.weight for linear in linears), head])
    for linear in linears:
        linear.packed = pack_weight(linear.weight, next(memory))
        linear.weight = _empty_weight(linear.weight)
    base.packed_head = pack_weight(head, next(memory))
    if base.head is not None:
        base.head.weight = _empty_weight(head)
    else:
        base.embedding.packed = base.packed_head
        base.embedding.weight = _empty_weight(head)


def _allocate(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Memory for the panels of each weight, in its type; all of one type in one piece."""
    pieces: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in {weight.dtype for weight in weights}:
        sizes = [packed_size(weight) for weight in weights if weight.dtype == dtype]
        pieces[dtype] = iter(empty_huge([sum(sizes)], dtype, weights[0].device).split(sizes))
    return (next(pieces[weight.dtype]) for weight in weights)


def _empty_weight(like: Tensor) -> nn.Parameter:
    """Stands in for a packed weight: any use of it fails by its shape."""
    return nn.Parameter(like.new_empty(0), requires_grad=False)
