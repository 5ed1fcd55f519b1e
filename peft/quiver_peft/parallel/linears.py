"""A base's linears over the ranks, on Megatron-Core's layers: cut by their rows (outputs) or their columns (inputs).

Without adapters they are Megatron's own forward pass. With adapters the communication is the same and no more: it is
apart, in `gather_input` and `reduce_output`, and the adapters' products lie between.

    columns [N / ranks, K]:  x ── gather_input: nothing ── x Wᵀ (+ LoRA) ── reduce_output: nothing
                                  (backward: sum of ranks)
    rows    [N, K / ranks]:  x ── gather_input: nothing ── x Wᵀ (+ LoRA) ── reduce_output: sum of ranks, then the bias
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from quiver_peft.base.sites import Linear
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import Shard, gather, set_shard
from quiver_peft.parallel.tokens import gather_tokens, reduce_scatter_tokens, sequence_first

# The linears whose inputs are cut: they end a sub-layer that began with one whose outputs are.
_ROW_PARALLEL_SITES = ("attention.out", "cross_attention.out", "mlp.down")


def is_column_parallel(linear: Linear) -> bool:
    """Whether a rank's share is rows (outputs), else columns (inputs); by its place, so also of a whole one."""
    return linear.site.kind not in _ROW_PARALLEL_SITES


def _no_init(weight: Tensor) -> Tensor:
    return weight  # Megatron asks for an initialisation that it is told to leave out


class SplitLinear(Linear):
    """in_features, out_features and parts stay those of the whole linear; weight and bias are this rank's."""

    def __init__(self, plain: Linear, mesh: Mesh, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.site = plain.site
        self.in_features, self.out_features, self.parts = plain.in_features, plain.out_features, plain.parts
        self.packed = None
        self.mesh = mesh
        # Registered here first, so that they keep the names that they have in a base on one device.
        self.weight: nn.Parameter = layer.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Megatron's own forward pass. x: [B, S, K], of it this rank's -> [B, S, N], of it this rank's."""
        if not self.mesh.sequence:
            return self.layer(x)[0]
        return self.layer(sequence_first(x))[0].transpose(0, 1)

    def plain_weight(self) -> Tensor:
        """The whole weight [N, K], from all ranks."""
        return gather(self.weight, self.mesh)


class ColumnParallelLinear(SplitLinear):
    """Each rank has its share of the rows of every part: whole heads, and gate and up of the same features."""

    def __init__(self, plain: Linear, mesh: Mesh) -> None:
        layer = tensor_parallel.ColumnParallelLinear(
            plain.in_features,
            plain.out_features,
            config=mesh.layer_config(plain.weight.dtype),
            init_method=_no_init,
            bias=plain.bias is not None,
            gather_output=False,
            tp_group=mesh.tensor,
        )
        super().__init__(plain, mesh, layer)
        shard = Shard(0, tuple(self.parts.values()))
        self.local_parts = dict(zip(self.parts, shard.local_parts(mesh), strict=True))
        set_shard(self.weight, shard)
        if self.bias is not None:
            set_shard(self.bias, shard)

    def gather_input(self, x: Tensor) -> Tensor:
        """All tokens on every rank; backward, the sum of what the ranks' rows give."""
        if self.mesh.sequence:
            return gather_tokens(x, self.mesh, gradients_are_shares=True)
        return copy_to_tensor_model_parallel_region(x, group=self.mesh.tensor)

    def matmul(self, x: Tensor) -> Tensor:
        """x: [B, S, K] -> [B, S, N / ranks]."""
        return F.linear(x, self.weight, self.bias)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """y: [B, S, N / ranks] -> this rank's of each part."""
        return y.split([end - start for start, end in self.local_parts.values()], dim=-1)

    def part_rows(self, part: str) -> tuple[int, int]:
        """Which rows of this rank's weight are a part's."""
        return self.local_parts[part] if part else (0, self.weight.shape[0])

    def row_norms(self, rows: tuple[int, int], delta: Tensor) -> Tensor:
        """Of this rank's rows, which it has whole."""
        return torch.linalg.vector_norm(self.weight.detach()[rows[0] : rows[1]].float() + delta, dim=1)


class RowParallelLinear(SplitLinear):
    """Each rank has its share of the columns, for the inputs that it has computed itself."""

    def __init__(self, plain: Linear, mesh: Mesh) -> None:
        layer = tensor_parallel.RowParallelLinear(
            plain.in_features,
            plain.out_features,
            config=mesh.layer_config(plain.weight.dtype),
            init_method=_no_init,
            bias=plain.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tensor,
        )
        super().__init__(plain, mesh, layer)
        set_shard(self.weight, Shard(1, ((0, self.in_features),)))
        if self.bias is not None:
            set_shard(self.bias, gradient_is_share=mesh.sequence)

    def matmul(self, x: Tensor) -> Tensor:
        """x: [B, S, K / ranks] -> [B, S, N], a summand of it."""
        return F.linear(x, self.weight)

    def reduce_output(self, y: Tensor) -> Tensor:
        """The sum over the ranks, and the bias."""
        if self.mesh.sequence:
            y = reduce_scatter_tokens(y, self.mesh)
        else:
            y = reduce_from_tensor_model_parallel_region(y, group=self.mesh.tensor)
        return y if self.bias is None else y + self.bias

    def row_norms(self, rows: tuple[int, int], delta: Tensor) -> Tensor:
        """From the squares of all ranks' columns. delta: [rows, K / ranks]."""
        squares = (self.weight.detach()[rows[0] : rows[1]].float() + delta).square().sum(dim=1)
        dist.all_reduce(squares, group=self.mesh.tensor)
        return squares.sqrt()
