"""From a plan to tensors: one packed batch, no padding. T tokens, R rows whose logits are wanted."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from quiver_peft.adapters.serving.torch_seam import RowGroup, VirtualRows
from quiver_peft.base.paged import PagedLayout
from quiver_peft.kernels.pinned_upload import PinnedUpload
from quiver_server.engine.encoder_batch import EncoderBatch, extend_row_groups, prepare_encoder_batch
from quiver_server.engine.scheduler import ScheduledChunk


@dataclass(frozen=True)
class StepBatch:
    """What the model is given in one step.

    tokens, positions: [T] int64. layout: where their keys and values lie. groups: rows of one adapter each.
    virtual: rows that hold an adapter's virtual tokens.
    logit_rows: [R] int64, rows of the batch; `logit_counts` says how many of them each chunk has, in order.
    sources: of an encoder-decoder, what the rows attend to.
    """

    tokens: Tensor
    positions: Tensor
    layout: PagedLayout
    groups: list[RowGroup]
    virtual: list[VirtualRows]
    logit_rows: Tensor
    logit_counts: list[int]
    encoder: EncoderBatch | None


def prepare_batch(chunks: Seq[ScheduledChunk], block_size: int, device: torch.device) -> StepBatch:
    """The tensors of one step; chunks are ordered by slot."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[RowGroup] = []
    virtual: list[VirtualRows] = []
    logit_rows: list[int] = []
    logit_counts: list[int] = []
    for chunk in chunks:
        sequence, first_row = chunk.sequence, len(tokens)
        start = sequence.num_cached_tokens
        end = start + chunk.num_new_tokens
        tokens += sequence.tokens(start, end)
        positions += range(start, end)
        extend_row_groups(groups, RowGroup(sequence.slot, first_row, len(tokens)))
        if start < sequence.num_virtual_tokens:
            num_virtual = min(end, sequence.num_virtual_tokens) - start
            virtual.append(VirtualRows(sequence.slot, first_row, first_row + num_virtual, start))
        wanted = _wanted_rows(chunk)
        logit_rows += range(len(tokens) - wanted, len(tokens))
        logit_counts.append(wanted)
    transfer = PinnedUpload(device)
    numbers = [transfer.add(part) for part in (tokens, positions, logit_rows)]
    layout = PagedLayout(
        [chunk.num_new_tokens for chunk in chunks],
        [chunk.sequence.num_cached_tokens + chunk.num_new_tokens for chunk in chunks],
        [chunk.sequence.blocks for chunk in chunks],
        block_size,
        transfer,
    )
    transfer.send()
    on_device = [part().long() for part in numbers]
    return StepBatch(
        on_device[0],
        on_device[1],
        layout,
        groups,
        virtual,
        on_device[2],
        logit_counts,
        prepare_encoder_batch(chunks, block_size, device) if chunks[0].sequence.encoder_input else None,
    )


def _wanted_rows(chunk: ScheduledChunk) -> int:
    """How many of a chunk's last rows need logits: what tells of later prompt tokens, else only the last."""
    sequence = chunk.sequence
    still_in_prompt = sequence.num_cached_tokens < sequence.num_prompt_positions
    if sequence.params.prompt_logprobs and not sequence.generated and still_in_prompt:
        end = sequence.num_cached_tokens + chunk.num_new_tokens
        first = sequence.num_virtual_tokens + sequence.first_logprob - 1  # the row before the first token to tell of
        return max(min(chunk.num_new_tokens, end - first), 0)
    return 1 if chunk.completes else 0
