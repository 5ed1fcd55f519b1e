"""From a plan to tensors for an encoder-decoder: the sources that are read in this step, and those attended to."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_peft.adapters.serving.torch_seam import RowGroup, VirtualRows
from quiver_peft.base.paged_t5 import SourceLayout
from quiver_server.engine.scheduler import ScheduledChunk


@dataclass(frozen=True)
class EncoderBatch:
    """layout: where the sources of all sequences of the step lie.

    tokens: [T] int64, the new sources one after another, `lengths` tokens each; empty when no sequence is new.
    groups, virtual: whose rows these are, as in `StepBatch`.
    """

    layout: SourceLayout
    tokens: Tensor
    lengths: list[int]
    groups: list[RowGroup]
    virtual: list[VirtualRows]


def prepare_encoder_batch(chunks: Seq[ScheduledChunk], block_size: int, device: torch.device) -> EncoderBatch:
    """The sources of one step; chunks are ordered by slot."""
    tokens: list[int] = []
    lengths: list[int] = []
    groups: list[RowGroup] = []
    virtual: list[VirtualRows] = []
    for chunk in chunks:
        sequence, row = chunk.sequence, len(tokens)
        if not chunk.num_new_encoder_tokens:
            continue
        num_virtual = sequence.num_virtual_encoder_tokens
        tokens += [0] * num_virtual + sequence.encoder_input
        lengths.append(chunk.num_new_encoder_tokens)
        extend_row_groups(groups, RowGroup(sequence.slot, row, len(tokens)))
        if num_virtual:
            # An adapter's prompt is numbered after its prefix, which stands before the target.
            virtual.append(VirtualRows(sequence.slot, row, row + num_virtual, sequence.num_virtual_tokens))
    layout = SourceLayout(
        [chunk.num_new_tokens for chunk in chunks],
        [chunk.sequence.num_encoder_tokens for chunk in chunks],
        [chunk.sequence.encoder_blocks for chunk in chunks],
        [chunk.num_new_encoder_tokens > 0 for chunk in chunks],
        block_size,
        device,
    )
    return EncoderBatch(layout, torch.tensor(tokens, dtype=torch.int64, device=device), lengths, groups, virtual)


def extend_row_groups(groups: list[RowGroup], new: RowGroup) -> None:
    """Append rows to those of the same adapter, or begin a new group."""
    if groups and groups[-1].slot == new.slot:
        groups[-1] = groups[-1]._replace(end=new.end)
    else:
        groups.append(new)
