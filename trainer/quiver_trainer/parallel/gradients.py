"""Distributed gradients: each rank's share of the loss, reduced by Megatron-Core.

The loss of a batch is the mean over its completion tokens, on whichever rank their rows are: each rank's share is its
sum divided by the total count, so gradients are summed, never averaged, and equal those of one device.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from quiver_peft.model import AnyModel
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import get_shard
from quiver_trainer.data.jsonl import Sample
from quiver_trainer.parallel.rows import pad_rows, shard_rows


class Gradients:
    """Gradients of the trainable parameters. parameters: this rank's shards, by their single-device names."""

    def __init__(
        self,
        model: AnyModel,
        mesh: Mesh,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        *,
        overlap: bool = True,
    ) -> None:
        """overlap: reduce gradients during the backward pass; False only for measurements."""
        self._parameters = list(parameters.values())
        self._model, self._mesh, self._seed = model, mesh, seed
        # Megatron starts each bucket's all-reduce as soon as it is full.
        reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
        self._ddp = DistributedDataParallel(_megatron_config(model, mesh), reduction, model)

    def compute(self, batches: Sequence[Sequence[Sample]], step: int, loss_scale: float) -> float:
        """Compute a step's gradients times `loss_scale` on every rank; returns the loss."""
        num_targets = sum(len(s.tokens) - s.num_prompt_tokens for samples in batches for s in samples)
        self._ddp.zero_grad_buffer()
        torch.manual_seed(_step_seed(self._seed, step, self._mesh.data_rank))  # dropout
        total = torch.zeros((), device=self._mesh.device)
        for i, samples in enumerate(batches):
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else self._ddp.no_sync():
                loss = self._share_of_loss(samples) / num_targets
                (loss * loss_scale).backward()
            total += loss.detach()
        finalize_model_grads([self._ddp])
        for parameter in self._parameters:
            parameter.grad = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue] - Megatron's buffer
        dist.all_reduce(total, group=self._mesh.data)
        return total.item()

    def _share_of_loss(self, samples: Sequence[Sample]) -> Tensor:
        """This rank's share of the loss."""
        mine = shard_rows(samples, self._mesh)
        # A rank without a row computes one all the same, for nothing: the others wait for its part in the reduction.
        rows = pad_rows(mine or samples[:1], self._model, self._mesh)
        hidden = self._model.hidden(*rows.inputs).flatten(0, 1).index_select(0, rows.positions)
        return self._model.base.cross_entropy(hidden, rows.targets).sum() * bool(mine)

    def clip(self, longest: float) -> float:
        """Clip the global gradient norm to `longest`; returns the norm before clipping."""
        cut = [p.grad for p in self._parameters if p.grad is not None and get_shard(p).dim is not None]
        whole = [p.grad for p in self._parameters if p.grad is not None and get_shard(p).dim is None]
        squares = nn.utils.get_total_norm(cut).square().to(self._mesh.device)
        dist.all_reduce(squares, group=self._mesh.tensor)
        length = (squares + nn.utils.get_total_norm(whole).square().to(self._mesh.device)).sqrt()
        nn.utils.clip_grads_with_norm_(self._parameters, longest, length)
        return length.item()


def _megatron_config(model: AnyModel, mesh: Mesh) -> TransformerConfig:
    """Megatron's configuration: sums stay sums, and sequence-parallel gradients are summed over ranks."""
    config = model.base.config
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        tensor_model_parallel_size=mesh.tensor_size,
        sequence_parallel=mesh.tensor_size > 1,
        calculate_per_token_loss=True,
        use_cpu_initialization=mesh.device.type == "cpu",
    )


def _step_seed(seed: int, step: int, data_rank: int) -> int:
    """A seed for each step and data-parallel replica, equal on the replica's ranks, also after a resume."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {data_rank}".encode()).digest()[:7], "big")
