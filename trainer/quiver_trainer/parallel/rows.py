"""The rows of one rank: sharding and padding.

Shapes: B rows, S tokens of the longest, R completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_peft.base.t5 import T5Base
from quiver_peft.model import T5, AnyModel
from quiver_peft.parallel.mesh import Mesh
from quiver_trainer.data.jsonl import Sample


@dataclass(frozen=True)
class Rows:
    """inputs: what the model's `hidden` takes. positions: [R], in its flattened output, those whose next token is
    predicted; targets: [R], those tokens."""

    inputs: tuple[Tensor, ...]
    positions: Tensor
    targets: Tensor


def shard_rows(samples: Sequence[Sample], mesh: Mesh) -> list[Sample]:
    """The samples of this rank of the data-parallel group."""
    return list(samples[mesh.data_rank :: mesh.data_size])


def pad_rows(samples: Sequence[Sample], model: AnyModel, mesh: Mesh) -> Rows:
    """Tensors on the mesh's device, right-padded with id 0, which causal attention hides.

    With sequence parallelism the length, virtual tokens included, is rounded up to an even split.
    """
    if isinstance(model, T5):
        inputs, positions = _source_and_target(samples, model, mesh)
    else:
        tokens = _pad([sample.tokens for sample in samples], model.num_virtual_in(""), mesh)
        positions = _positions(
            [(sample.num_prompt_tokens - 1, len(sample.tokens) - 1) for sample in samples], tokens.shape[1]
        )
        inputs = (tokens,)
    targets = [token for sample in samples for token in sample.tokens[sample.num_prompt_tokens :]]
    return Rows(
        tuple(tensor.to(mesh.device) for tensor in inputs),
        torch.tensor(positions, device=mesh.device),
        torch.tensor(targets, device=mesh.device),
    )


def _source_and_target(samples: Sequence[Sample], model: T5, mesh: Mesh) -> tuple[tuple[Tensor, ...], list[int]]:
    """The prompt as source, the completion as target, shifted right behind the start token."""
    sources = [sample.tokens[: sample.num_prompt_tokens] for sample in samples]
    targets = [with_start(sample.tokens[sample.num_prompt_tokens : -1], model.base) for sample in samples]
    padded = _pad(targets, model.num_virtual_in("decoder"), mesh)
    positions = _positions([(0, len(target)) for target in targets], padded.shape[1])
    lengths = torch.tensor([len(source) for source in sources])
    return (_pad(sources, model.num_virtual_in("encoder"), mesh), padded, lengths), positions


def with_start(target: Sequence[int], base: T5Base) -> list[int]:
    """The decoder input of a T5: the start token, then all but the last."""
    return [base.config.start_token_id, *target]


def pad_prompts(prompts: Sequence[Sequence[int]], num_virtual: int, mesh: Mesh) -> Tensor:
    """Right-padded prompts [B, S] on the mesh's device."""
    return _pad(prompts, num_virtual, mesh).to(mesh.device)


def _positions(ranges: Sequence[tuple[int, int]], longest: int) -> list[int]:
    """Ranges within each row as positions in the flattened rows."""
    return [i * longest + j for i, (start, end) in enumerate(ranges) for j in range(start, end)]


def _pad(rows: Sequence[Sequence[int]], num_virtual: int, mesh: Mesh) -> Tensor:
    longest = max(map(len, rows))
    if mesh.sequence:
        longest += -(longest + num_virtual) % mesh.tensor_size
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
