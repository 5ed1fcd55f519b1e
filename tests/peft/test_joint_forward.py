"""One packed pass for many adapters gives each the hidden states of its own padded pass, and the same gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, random_prompts, tiny_gpt2, tiny_llama, tiny_mistral, tiny_t5
from torch import Tensor

from quiver_peft import (
    GPT,
    T5,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
    load_model,
)
from quiver_peft.joint_forward import ModelInput, joint_hidden
from quiver_peft.model import AnyModel

BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mistral": tiny_mistral, "t5": tiny_t5}
ADAPTERS: list[list[Any]] = [
    [LoraPEFTConfig(adapter_dim=3, target_modules=["all"])],
    [LoraPEFTConfig(adapter_dim=2, use_dora=True), IA3PEFTConfig()],
    [
        PtuningPEFTConfig(virtual_tokens=4, bottleneck_dim=8, embedding_dim=8),
        CanonicalAdaptersPEFTConfig(adapter_dim=3),
    ],
    [PrefixPEFTConfig(virtual_tokens=3), PromptTuningPEFTConfig(virtual_tokens=2)],
]
LENGTHS = [[9, 4], [17, 1, 6], [5], [8, 8]]


def models_on(base: AnyModel) -> list[AnyModel]:
    found: list[AnyModel] = []
    for i, configs in enumerate(ADAPTERS):
        model = GPT(base.base) if isinstance(base, GPT) else T5(base.base)
        torch.manual_seed(i)
        model.add_adapter(configs)
        for parameter in model.trainable_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        found.append(model)
    return found


def alone(model: AnyModel, inputs: ModelInput) -> Tensor:
    """One sequence after the other, each in a pass of its own, as the library's users call it."""
    if isinstance(model, T5):
        pairs = zip(inputs.sources, inputs.written, strict=True)
        return torch.cat([model.hidden(torch.tensor([list(s)]), torch.tensor([list(w)]))[0] for s, w in pairs])
    return torch.cat([model.hidden(torch.tensor([list(row)]))[0] for row in inputs.written])


def inputs_for(model: AnyModel, lengths: Sequence[int], seed: int) -> ModelInput:
    if isinstance(model, T5):
        return ModelInput(random_prompts(lengths, seed + 50), random_prompts([n + 3 for n in lengths], seed))
    return ModelInput(random_prompts(lengths, seed))


@pytest.mark.parametrize("kind", BASES)
def test_each_gets_what_it_gets_alone(kind: str, tmp_path: Path) -> None:
    BASES[kind](tmp_path)
    models = models_on(load_model(tmp_path))
    inputs = [
        inputs_for(model, lengths, 10 * i) for i, (model, lengths) in enumerate(zip(models, LENGTHS, strict=True))
    ]
    joint = joint_hidden(models, inputs)
    parts = joint.split([sum(map(len, own.written)) for own in inputs])
    weight = torch.randn(joint.shape[-1])
    for model, own, part in zip(models, inputs, parts, strict=True):
        expected = alone(model, own)
        assert_close(part.detach(), expected.detach())
        parameters = list(model.trainable_parameters())
        gradients = torch.autograd.grad((part @ weight).sum(), parameters, retain_graph=True)
        for actual, wanted in zip(gradients, torch.autograd.grad((expected @ weight).sum(), parameters), strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=1e-3)


def test_a_sequence_does_not_see_its_neighbours(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    rows = random_prompts([7, 12, 3])
    changed = [rows[0], random_prompts([12], seed=99)[0], rows[2]]
    one, other = (joint_hidden([model], [ModelInput(r)]) for r in (rows, changed))
    assert torch.equal(one[:7], other[:7]) and torch.equal(one[19:], other[19:])
    assert not torch.equal(one[7:19], other[7:19])
