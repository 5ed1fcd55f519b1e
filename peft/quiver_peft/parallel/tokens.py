"""Sequence parallelism's way of the tokens: between the linears each rank keeps a slice of every sequence.

Megatron's mappings cut the first dimension; ours are [B, S, D], so S is brought there and back.
"""

from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from quiver_peft.errors import QuiverError
from quiver_peft.parallel.mesh import Mesh


def sequence_first(x: Tensor) -> Tensor:
    """[B, S, *] -> [S, B, *], as it lies in memory."""
    return x.transpose(0, 1).contiguous()


def scatter_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """[B, S, D], the same on every rank -> [B, S / ranks, D]. Raises QuiverError where S cannot be cut."""
    if x.shape[1] % mesh.tensor_size:
        raise QuiverError(
            f"sequence parallelism: sequences of {x.shape[1]} tokens, virtual ones included, cannot be cut into "
            f"{mesh.tensor_size} equal pieces; pad them"
        )
    return scatter_to_sequence_parallel_region(sequence_first(x), group=mesh.tensor).transpose(0, 1)


def gather_tokens(x: Tensor, mesh: Mesh, *, gradients_are_shares: bool) -> Tensor:
    """[B, S / ranks, D] -> [B, S, D]. gradients_are_shares: what follows gives each rank a share of the gradient."""
    whole = gather_from_sequence_parallel_region(
        sequence_first(x), tensor_parallel_output_grad=gradients_are_shares, group=mesh.tensor
    )
    return whole.transpose(0, 1)


def reduce_scatter_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """Of each rank's summand [B, S, D] the sum, of which each keeps its tokens: [B, S / ranks, D]."""
    return reduce_scatter_to_sequence_parallel_region(sequence_first(x), group=mesh.tensor).transpose(0, 1)
