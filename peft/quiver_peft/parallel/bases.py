"""Tensor-parallel bases: the same definition, with linears, embedding and head replaced by this rank's shards."""

from pathlib import Path

import torch
from torch import Tensor, nn

from quiver_peft.base.base import Base
from quiver_peft.base.checkpoint import read_config
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.family import TensorMapping
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.sites import Linear
from quiver_peft.base.t5 import T5Base
from quiver_peft.base.t5_attention import RelativeBias
from quiver_peft.errors import CheckpointError
from quiver_peft.parallel.linears import ColumnParallelLinear, RowParallelLinear, is_column_parallel
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import Shard, gather, get_shard, set_shard
from quiver_peft.parallel.vocabulary import MegatronHooks, SplitHead, split_embedding, vocabulary_shard


def load_split_base(folder: str | Path, mesh: Mesh, *, dtype: torch.dtype = torch.float32) -> GPTBase | T5Base:
    """Loads this rank's shard of a Hugging Face folder; no more is ever in memory. Raises CheckpointError."""
    kind = T5Base if read_config(Path(folder))["model_type"] in T5_FAMILIES else GPTBase
    base = kind.on_meta_device(folder, dtype=dtype)
    if mesh.tensor_size > 1:
        _require_divisible(base, mesh)
        _split(base, mesh)
    else:
        _mark(base, mesh)
    _to_device(base, mesh)
    base.load_tensors(folder, lambda rename, tensor: _cut(base, mesh, rename, tensor))
    return base.eval()


@torch.no_grad()
def gather_base(base: GPTBase | T5Base, folder: str | Path, mesh: Mesh) -> GPTBase | T5Base:
    """Gathers the whole base in fp32 on the first rank's CPU, to be written; other ranks get it on the meta device.

    folder: the folder that it was read from. A collective: every rank must call it.
    """
    whole = type(base).on_meta_device(folder, dtype=torch.float32)
    if mesh.is_first:
        whole.to_empty(device="cpu")
    places = dict(whole.named_parameters())
    for name, parameter in base.named_parameters():
        found = gather(parameter, mesh)
        if mesh.is_first:
            places[name].data.copy_(found)
    return whole


def _require_divisible(base: Base, mesh: Mesh) -> None:
    config, size = base.config, mesh.tensor_size
    for name, value in (
        ("num_attention_heads", config.num_heads),
        ("num_key_value_heads", config.num_kv_heads),
        ("intermediate_size", config.ffn_size),
    ):
        if value % size:
            raise CheckpointError(
                f"parallel.tensor: {size} does not divide the {value} {name} of this base; choose a divisor"
            )


def _split(base: Base, mesh: Mesh) -> None:
    """Replaces linears, relative bias, embedding and head of a base on the meta device by shards, in place."""
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(
                    module,
                    name,
                    (ColumnParallelLinear if is_column_parallel(child) else RowParallelLinear)(child, mesh),
                )
        if isinstance(module, RelativeBias):
            num_buckets, num_heads = module.weight.shape
            weight = module.weight.new_empty(num_buckets, num_heads // mesh.tensor_size)
            module.weight = set_shard(nn.Parameter(weight), Shard(1, ((0, num_heads),)))
    base.embedding = split_embedding(base.embedding, mesh)  # pyright: ignore[reportAttributeAccessIssue] - it looks up
    if base.head is not None:
        base.head = SplitHead(base.head, mesh)  # pyright: ignore[reportAttributeAccessIssue] - its weight is all
    base.parallel_hooks = MegatronHooks(mesh, base.config.vocab_size)


def _mark(base: Base, mesh: Mesh) -> None:
    """On one rank, records how parameters would be sharded: checkpoints then load with any number of ranks."""
    for linear in base.linears():
        for parameter in (linear.weight, linear.bias):
            if parameter is not None and is_column_parallel(linear):
                set_shard(parameter, Shard(0, tuple(linear.parts.values())))
    for table in (base.embedding, base.head):
        if table is not None:
            set_shard(table.weight, vocabulary_shard(base.config.vocab_size, mesh))


def _to_device(base: Base, mesh: Mesh) -> None:
    """Allocates the parameters that are still on the meta device: all but linears and vocabulary."""
    for name, module in base.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                new = nn.Parameter(torch.empty_like(parameter, device=mesh.device))
                set_shard(new, get_shard(parameter), gradient_is_share=_is_sharded(name, mesh))
                setattr(module, key, new)


def _is_sharded(name: str, mesh: Mesh) -> bool:
    """Whether a replicated module is applied to this rank's heads or tokens only, so that its gradients are summed."""
    if name.endswith((".q_norm", ".k_norm")):
        return mesh.tensor_size > 1
    return mesh.sequence and "norm" in name


def _cut(base: Base, mesh: Mesh, rename: TensorMapping, tensor: Tensor) -> Tensor:
    """This rank's shard of a checkpoint tensor, which may be one part of a fused linear."""
    shard = get_shard(base.get_parameter(rename.ours))
    if rename.part and shard.dim == 0:
        shard = Shard(0, ((0, tensor.shape[0]),))
    return shard.share(tensor, mesh)
