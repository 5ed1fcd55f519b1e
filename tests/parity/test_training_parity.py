"""Training as Hugging Face PEFT trains: from the same first weights, the same gradients and the same steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from server.bench import make_base
from tiny import hf_model, random_tokens, their_deprecations
from torch import Tensor, nn

from quiver_peft import (
    GPT,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
)
from quiver_peft.adapters.ia3 import IA3Scale
from quiver_peft.adapters.lora import LoraPair

TOKENS = random_tokens(3, 14, seed=8)
CHECKED_STEPS = (1, 10)


class Case(NamedTuple):
    theirs: Callable[[], Any]
    ours: Any
    learning_rate: float = 1e-2


_TASK: Any = {"task_type": "CAUSAL_LM"}
_MLP_NAMES = ["k_proj", "v_proj", "down_proj"]
CASES = {
    "lora": Case(
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **_TASK),
        LoraPEFTConfig(adapter_dim=4, alpha=8, target_modules=["q_proj", "v_proj"], variant="canonical"),
    ),
    "dora": Case(
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], use_dora=True, **_TASK),
        LoraPEFTConfig(adapter_dim=4, alpha=8, target_modules=["q_proj", "o_proj"], variant="canonical", use_dora=True),
    ),
    "ia3": Case(
        lambda: IA3Config(target_modules=_MLP_NAMES, feedforward_modules=["down_proj"], **_TASK),
        IA3PEFTConfig(target_modules=_MLP_NAMES, feedforward_modules=["down_proj"]),
    ),
    "prompt tuning": Case(
        lambda: PromptTuningConfig(num_virtual_tokens=5, **_TASK), PromptTuningPEFTConfig(5, init="random")
    ),
    "P-Tuning, MLP": Case(
        lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, **_TASK),
        PtuningPEFTConfig(5, encoder="mlp", encoder_hidden_size=24),
        1e-3,
    ),
    "P-Tuning, LSTM": Case(
        lambda: PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=24, encoder_reparameterization_type="LSTM", **_TASK
        ),
        PtuningPEFTConfig(5, encoder="lstm", encoder_hidden_size=24),
        1e-3,
    ),
    "prefix": Case(lambda: PrefixTuningConfig(num_virtual_tokens=4, **_TASK), PrefixPEFTConfig(4)),
    "prefix, projected": Case(
        lambda: PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24, **_TASK),
        PrefixPEFTConfig(4, projection=True, encoder_hidden_size=24),
        1e-3,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_base(tmp_path_factory.mktemp("llama"))


def pairs(ours: GPT, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our trained parameters, each with theirs: by the module's name, or, for prompt encoders, in order."""
    assert ours.adapter is not None
    left = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found: list[tuple[nn.Parameter, nn.Parameter]] = []
    for module in ours.adapter.modules():
        if isinstance(module, LoraPair):
            prefix = f"base_model.model.{module.target.name}."
            found.append((module.a, left.pop(prefix + "lora_A.default.weight")))
            found.append((module.b, left.pop(prefix + "lora_B.default.weight")))
            if module.magnitude is not None:
                found.append((module.magnitude, left.pop(prefix + "lora_magnitude_vector.default.weight")))
        elif isinstance(module, IA3Scale):
            found.append((module.scale, left.pop(f"base_model.model.{module.target.name}.ia3_l.default")))
    if not found:
        found = list(zip(ours.trainable_parameters(), left.values(), strict=True))
        left = {}
    assert not left and len(found) == len(list(ours.trainable_parameters()))
    return found


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, -TOKENS.shape[1] : -1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_peft(name: str, folder: Path) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    with their_deprecations():
        theirs = get_peft_model(hf_model(folder), case.theirs())
    ours = GPT.from_pretrained(folder)
    ours.add_adapter(case.ours)
    together = pairs(ours, theirs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, other in together:
            other += 0.1 * torch.randn(other.shape, generator=generator)
            mine.copy_(other.view_as(mine))
    before = [mine.detach().clone() for mine, _ in together]
    optimisers = [torch.optim.AdamW(side, lr=case.learning_rate) for side in zip(*together, strict=True)]
    for step in range(1, max(CHECKED_STEPS) + 1):
        loss_of(ours(TOKENS)).backward()
        loss_of(theirs(input_ids=TOKENS).logits).backward()
        for i, (mine, other) in enumerate(together):
            assert mine.grad is not None and other.grad is not None, i
            torch.testing.assert_close(mine.grad, other.grad.view_as(mine), atol=1e-4, rtol=1e-3)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step in CHECKED_STEPS:
            for mine, other in together:
                torch.testing.assert_close(mine.data, other.data.view_as(mine), atol=1e-4, rtol=1e-4)
    for (mine, _), start in zip(together, before, strict=True):
        assert (mine - start).abs().max().item() > case.learning_rate, "the training moved nothing"
