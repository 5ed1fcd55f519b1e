"""`pack`: rearranges a base's weights into the layout of the compiled CPU kernels."""

import torch
from torch import Tensor, nn

from quiver_peft.base.base import Base
from quiver_peft.kernels.huge_pages import empty_huge
from quiver_peft.kernels.packed_linear import can_pack, pack_weight, packed_size


@torch.no_grad()
def pack(base: Base) -> None:
    """Packs every linear and the head, in place; does nothing where packing brings no speed.

    A packed base cannot be trained. Weights are replaced one at a time, so the peak memory is the base and one weight.
    A tied head is packed in addition to the embedding, which is still needed for look-ups.
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
    """Stands in for a packed weight: any use of it fails by its shape."""
    return nn.Parameter(like.new_empty(0), requires_grad=False)
