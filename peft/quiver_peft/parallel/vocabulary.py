"""A vocabulary cut over the ranks: embedding, head and loss. It is padded with words nobody uses to be cut evenly.

Shapes: R rows, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from quiver_peft.parallel.mesh import Mesh
from quiver_peft.parallel.shards import Shard, gather, set_shard
from quiver_peft.parallel.tokens import gather_tokens, scatter_tokens
from quiver_peft.rounding import round_up


def vocabulary_shard(size: int, mesh: Mesh) -> Shard:
    """How the rows of an embedding or a head lie."""
    padded = round_up(size, mesh.tensor_size)
    return Shard(0, ((0, padded),), length=size)


def split_embedding(plain: nn.Embedding, mesh: Mesh) -> VocabParallelEmbedding:
    """Each rank looks up the words that it has; their sum is the whole."""
    shard = vocabulary_shard(plain.num_embeddings, mesh)
    split = VocabParallelEmbedding(
        shard.parts[0][1],
        plain.embedding_dim,
        init_method=lambda weight: weight,  # pyright: ignore[reportUnknownLambdaType]
        config=mesh.layer_config(plain.weight.dtype),
        tp_group=mesh.tensor,
    )
    set_shard(split.weight, shard)
    return split


class SplitHead(nn.Module):
    """This rank's rows of the head. weight: [V / ranks, D]."""

    def __init__(self, plain: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        shard = vocabulary_shard(plain.out_features, mesh)
        size = shard.parts[0][1] // mesh.tensor_size, plain.in_features
        self.weight = set_shard(nn.Parameter(torch.empty(size, dtype=plain.weight.dtype, device=mesh.device)), shard)


class MegatronHooks:
    """The residual stream is whole on each rank, or cut by tokens; logits are cut by words."""

    def __init__(self, mesh: Mesh, vocab_size: int) -> None:
        self._mesh = mesh
        self._shard = vocabulary_shard(vocab_size, mesh)
        share = self._shard.parts[0][1] // mesh.tensor_size
        self._num_words = max(0, min(share, vocab_size - mesh.tensor_rank * share))

    def scatter_tokens(self, h: Tensor) -> Tensor:
        """[B, S, D] -> [B, S / ranks, D] with sequence parallelism, else as it is."""
        return scatter_tokens(h, self._mesh) if self._mesh.sequence else h

    def gather_tokens(self, h: Tensor) -> Tensor:
        """The reverse."""
        return gather_tokens(h, self._mesh, gradients_are_shares=False) if self._mesh.sequence else h

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """For answers, not for training: no gradient flows. hidden: [*, D], weight: [V / ranks, D] -> [*, V]."""
        local = F.linear(hidden, weight)
        last = local.ndim - 1
        return gather(local, self._mesh, Shard(last, self._shard.parts, self._shard.length))

    def cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden: [R, D], weight: [V / ranks, D], targets: [R] -> [R]."""
        local = F.linear(copy_to_tensor_model_parallel_region(hidden, group=self._mesh.tensor), weight).float()
        if self._num_words < local.shape[-1]:
            unused = torch.arange(local.shape[-1], device=local.device) >= self._num_words
            local = local.masked_fill(unused, -torch.inf)
        return vocab_parallel_cross_entropy(local, targets)
