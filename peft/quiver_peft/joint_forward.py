"""The forward pass of training: sequences of several adapters on one base, packed without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from quiver_peft.adapters.training.training_seam import RngScope, TrainingSeam
from quiver_peft.base.attention import CausalAttention
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.packed_sequences import PackedCrossAttention, PackedSelfAttention, PackedSequences
from quiver_peft.base.sites import NO_ADAPTERS, Seam, StackName
from quiver_peft.base.t5 import T5Base
from quiver_peft.base.t5_attention import BiasedAttention, WholeSources
from quiver_peft.model import AnyModel

Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ModelInput:
    """The input of one model of several on a base: token ids, without placeholders for virtual tokens.

    written: whole sequences of a GPT, or a T5's decoder inputs, start token first. sources: a T5's encoder inputs.
    """

    written: Sequences
    sources: Sequences = ()


def joint_hidden(
    models: Sequence[AnyModel], inputs: Sequence[ModelInput], drawing: Sequence[RngScope] | None = None
) -> Tensor:
    """Final hidden states of all `written` tokens, [T, D], model by model.

    models: all on the same base. Virtual tokens are inserted here; their hidden states are dropped.
    drawing: see `TrainingSeam`.
    """
    base = models[0].base
    device = base.embedding.weight.device
    last_stack: StackName = "decoder" if isinstance(base, T5Base) else ""
    written = [_with_placeholders(m, last_stack, i.written) for m, i in zip(models, inputs, strict=True)]
    lengths: dict[StackName, list[list[int]]] = {last_stack: _lengths(written)}
    if isinstance(base, T5Base):
        sources = [_with_placeholders(m, "encoder", i.sources) for m, i in zip(models, inputs, strict=True)]
        lengths["encoder"] = _lengths(sources)
        hidden = _t5_hidden(base, sources, written, _seam(models, lengths, device, drawing))
    else:
        hidden = _gpt_hidden(base, written, _seam(models, lengths, device, drawing))
    if not any(model.num_virtual_in(last_stack) for model in models):
        return hidden
    is_real = [
        i >= model.num_virtual_in(last_stack)
        for model, own in zip(models, lengths[last_stack], strict=True)
        for length in own
        for i in range(length)
    ]
    return hidden[torch.tensor(is_real, device=device)]


def _gpt_hidden(base: GPTBase, written: Sequence[Sequences], seam: Seam) -> Tensor:
    tokens, sequences = _pack(written, base.embedding.weight.device)
    attend = PackedSelfAttention(CausalAttention(base.config.windows), sequences)
    return base(tokens, sequences.positions, attend, seam)


def _t5_hidden(base: T5Base, sources: Sequence[Sequences], written: Sequence[Sequences], seam: Seam) -> Tensor:
    device = base.embedding.weight.device
    source_tokens, source = _pack(sources, device)
    tokens, target = _pack(written, device)
    read = PackedSelfAttention(BiasedAttention(base.encoder.bias, source.lengths), source)
    encoded = base.encode(source_tokens, read, seam)
    kept = PackedCrossAttention(WholeSources(source.lengths), source, target)
    base.precompute_cross_kv(encoded, kept, seam)
    return base(tokens, PackedSelfAttention(BiasedAttention(base.decoder.bias), target), kept, seam)


def _seam(
    models: Sequence[AnyModel],
    lengths: dict[StackName, list[list[int]]],
    device: torch.device,
    drawing: Sequence[RngScope] | None,
) -> Seam:
    adapters = [model.adapter for model in models if model.adapter is not None]
    if not adapters:
        return NO_ADAPTERS
    assert len(adapters) == len(models), "either every model has an adapter, or none"
    return TrainingSeam(adapters, lengths, device, drawing)


def _with_placeholders(model: AnyModel, stack: StackName, sequences: Sequences) -> Sequences:
    placeholders = [0] * model.num_virtual_in(stack)
    return [[*placeholders, *sequence] for sequence in sequences] if placeholders else sequences


def _lengths(of_models: Sequence[Sequences]) -> list[list[int]]:
    return [[len(sequence) for sequence in sequences] for sequences in of_models]


def _pack(of_models: Sequence[Sequences], device: torch.device) -> tuple[Tensor, PackedSequences]:
    """All tokens [T], and where the sequences lie among them."""
    sequences = list(chain.from_iterable(of_models))
    tokens = torch.tensor(list(chain.from_iterable(sequences)), device=device)
    return tokens, PackedSequences([len(sequence) for sequence in sequences], device)
