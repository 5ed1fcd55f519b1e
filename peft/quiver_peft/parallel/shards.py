"""How one parameter lies over the tensor-parallel ranks: cut along a dimension, or whole on each.

Whole ones come in two kinds. What every rank uses alike has the same gradient everywhere. What every rank uses with its
share of something else (a LoRA's A with its rows of B) has a share of its gradient on each: these are summed once a
step, all together, by Megatron's `finalize_model_grads`, instead of activations at every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from quiver_peft.parallel.mesh import Mesh

TensorT = TypeVar("TensorT", bound=Tensor)


@dataclass(frozen=True)
class Shard:
    """dim: cut along it; None: whole on every rank.

    parts: [start, end) of what is fused along `dim`, together all of it; each is cut into equal shares of its own.
    length: along `dim` without padding, where the parts end later than the tensor (a vocabulary).
    """

    dim: int | None = None
    parts: tuple[tuple[int, int], ...] = ()
    length: int | None = None

    def share(self, whole: Tensor, mesh: Mesh) -> Tensor:
        """What this rank holds of a whole tensor; padding is zeros."""
        if self.dim is None:
            return whole
        missing = self.parts[-1][1] - whole.shape[self.dim]
        if missing:
            whole = F.pad(whole, [0, 0] * (whole.ndim - 1 - self.dim) + [0, missing])
        pieces: list[Tensor] = []
        for start, end in self.parts:
            width = (end - start) // mesh.tensor_size
            pieces.append(whole.narrow(self.dim, start + mesh.tensor_rank * width, width))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def local_parts(self, mesh: Mesh) -> list[tuple[int, int]]:
        """[start, end) of each part in a rank's share."""
        found: list[tuple[int, int]] = []
        first = 0
        for start, end in self.parts:
            width = (end - start) // mesh.tensor_size
            found.append((first, first + width))
            first += width
        return found

    def whole(self, shares: Sequence[Tensor], mesh: Mesh) -> Tensor:
        """The tensor of which each rank holds a share, in the order of the ranks."""
        if self.dim is None:
            return shares[0]
        pieces = [
            share.narrow(self.dim, start, end - start) for start, end in self.local_parts(mesh) for share in shares
        ]
        whole = torch.cat(pieces, self.dim)
        return whole if self.length is None else whole.narrow(self.dim, 0, self.length)


REPLICATED = Shard()


def set_shard(parameter: TensorT, shard: Shard = REPLICATED, *, gradient_is_share: bool = False) -> TensorT:
    """Write down how a parameter lies, where Megatron (for the last) and `get_shard` look for it."""
    parameter.quiver_shard = shard  # pyright: ignore[reportAttributeAccessIssue]
    parameter.sequence_parallel = gradient_is_share  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def get_shard(parameter: Tensor) -> Shard:
    """How a parameter lies; whole where nothing else was said."""
    return getattr(parameter, "quiver_shard", REPLICATED)


def evenly(length: int) -> Shard:
    """Rows [0, length) cut evenly."""
    return Shard(0, ((0, length),))


@torch.no_grad()
def gather(parameter: Tensor, mesh: Mesh, shard: Shard | None = None) -> Tensor:
    """The whole tensor, on every rank; all ranks of the group must ask. shard: where the tensor is no parameter."""
    shard = shard or get_shard(parameter)
    if shard.dim is None or mesh.tensor_size == 1:
        return parameter.detach()
    shares = [torch.empty_like(parameter) for _ in range(mesh.tensor_size)]
    dist.all_gather(shares, parameter.detach().contiguous(), group=mesh.tensor)
    return shard.whole(shares, mesh)
