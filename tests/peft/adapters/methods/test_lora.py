"""LoRA's mathematics: identity at birth, scales, dropout, what is trainable, and what a configuration may say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import assert_matters, random_tokens

from quiver_peft import GPT, AdapterError, LoraPEFTConfig
from quiver_peft.adapters.methods.lora import LoraModule, LoraPair, init_lora_a, lora_scale
from quiver_peft.adapters.methods.targets import NEMO_PLACES, Target
from quiver_peft.base.sites import Linear, Site

TOKENS = random_tokens(2, 30)


@pytest.mark.parametrize("column_init_method", ["xavier", "normal", "kaiming"])
@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("place", [place for place in NEMO_PLACES if place != "cross_attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_adapter_equals_the_base_bit_for_bit(
    family: str, place: str, variant: Any, column_init_method: Any, model_folders: dict[str, Path]
) -> None:
    model = GPT.from_pretrained(model_folders[family])
    with torch.inference_mode():
        before = model(TOKENS)
    model.add_adapter(
        LoraPEFTConfig(target_modules=[place], variant=variant, column_init_method=column_init_method, adapter_dim=3)
    )
    assert sum(p.numel() for p in model.trainable_parameters()) > 0
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), before)


def test_only_the_adapter_is_trainable_and_gets_gradients(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    untouched = {name: p.detach().clone() for name, p in model.base.named_parameters()}
    model.add_adapter(LoraPEFTConfig(target_modules=["all"], adapter_dim=2))
    trainable = list(model.trainable_parameters())
    assert {id(p) for p in trainable} == {id(p) for name, p in model.named_parameters() if name.startswith("adapter.")}
    optimizer = torch.optim.SGD(trainable, lr=10.0)
    for _ in range(2):  # after the first step B is no longer zero, so that A learns too
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable)
    assert all(p.grad is None and torch.equal(p, untouched[name]) for name, p in model.base.named_parameters())


def test_parameter_counts_are_those_of_the_formula(model_folders: dict[str, Path]) -> None:
    """LoRA: the sum of r (d_in + d_out); NeMo's fused variant shares d_in (notation of Hu et al. 2021)."""

    def count(family: str, variant: Any, *places: str) -> int:
        model = GPT.from_pretrained(model_folders[family])
        model.add_adapter(LoraPEFTConfig(adapter_dim=4, target_modules=places, variant=variant))
        return sum(p.numel() for p in model.trainable_parameters())

    assert count("llama", "nemo", "attention_qkv") == 3 * 4 * (64 + 128)
    assert count("llama", "canonical", "attention_qkv") == 3 * 4 * (3 * 64 + 128)
    assert count("llama", "nemo", "mlp") == 3 * 4 * (64 + 192 + 96 + 64)
    assert count("llama", "nemo", "q_proj", "v_proj") == 3 * 4 * (2 * 64 + 64 + 32)
    assert count("gpt2", "nemo", "attention_qkv") == count("gpt2", "canonical", "c_attn") == 3 * 4 * (64 + 192)


def test_scales() -> None:
    assert lora_scale(8.0, 4, use_rslora=False) == 2.0
    assert lora_scale(8.0, 4, use_rslora=True) == 4.0


def test_alpha_defaults_to_the_rank_so_that_the_scale_is_one(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dim=6))
    assert model.adapter is not None
    assert model.adapter.lora is not None
    assert {(w.alpha, w.scale) for w in model.adapter.lora.weights()} == {(6.0, 1.0)}


@pytest.mark.parametrize(
    ("method", "deviation"), [("normal", 0.2), ("xavier", (2 / 288) ** 0.5), ("kaiming", (1 / 3 / 256) ** 0.5)]
)
def test_starts_have_the_deviation_of_their_definition(method: str, deviation: float) -> None:
    weight = torch.zeros(32, 256)
    torch.manual_seed(0)
    init_lora_a(weight, method)
    assert weight.std().item() == pytest.approx(deviation, rel=0.05)


def _module(dropout: float, position: Any) -> tuple[LoraModule, Linear, LoraPair]:
    """LoRA of the middle part of a fused linear."""
    linear = Linear(Site.in_layer(0, "attention.qkv"), 8, {"q": 6, "k": 5, "v": 4}, bias=True)
    pair = LoraPair(Target.of("k_proj", linear, "k"), 3, alpha=6.0, scale=2.0)
    torch.manual_seed(0)
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter)
    return LoraModule(LoraPEFTConfig(adapter_dropout=dropout, dropout_position=position), [pair]), linear, pair


def test_the_product_goes_to_the_rows_of_its_part_only() -> None:
    module, linear, pair = _module(0.0, "pre")
    x, y = torch.randn(7, 8), torch.randn(7, 15)
    after = module.add_output(linear, x, y)
    expected = y.clone()
    expected[:, 6:11] += 2.0 * (x @ pair.a.T) @ pair.b.T
    torch.testing.assert_close(after, expected)
    assert torch.equal(after[:, :6], y[:, :6])
    assert torch.equal(after[:, 11:], y[:, 11:])


def test_other_sites_are_left_alone() -> None:
    module, _, _ = _module(0.0, "pre")
    other = Linear(Site.in_layer(1, "attention.qkv"), 8, {"q": 6, "k": 5, "v": 4}, bias=True)
    y = torch.randn(7, 15)
    assert module.add_output(other, torch.randn(7, 8), y) is y


def test_dropout_before_is_on_the_input() -> None:
    module, linear, pair = _module(0.4, "pre")
    x, y = torch.randn(50, 8), torch.zeros(50, 15)
    torch.manual_seed(7)
    after = module.add_output(linear, x, y)[:, 6:11]
    torch.manual_seed(7)
    torch.testing.assert_close(after, 2.0 * (F.dropout(x, 0.4) @ pair.a.T) @ pair.b.T)


def test_dropout_after_is_on_the_product() -> None:
    module, linear, pair = _module(0.4, "post")
    x, y = torch.randn(50, 8), torch.zeros(50, 15)
    torch.manual_seed(7)
    after = module.add_output(linear, x, y)[:, 6:11]
    torch.manual_seed(7)
    torch.testing.assert_close(after, F.dropout(2.0 * (x @ pair.a.T) @ pair.b.T, 0.4))
    assert 0.3 < (after == 0).float().mean().item() < 0.5


@pytest.mark.parametrize("position", ["pre", "post"])
def test_there_is_no_dropout_in_evaluation(position: str, llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dropout=0.5, dropout_position="pre" if position == "pre" else "post"))
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.train()
    assert_matters(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter_dim": 0}, "adapter_dim must be at least 1, not 0"),
    ({"adapter_dim": -3}, "adapter_dim must be at least 1, not -3"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: the rank of 'q_proj' must be at least 1, not 0"),
    ({"alpha": 0.0}, "alpha must be above 0, not 0.0"),
    ({"alpha": -1.0}, "alpha must be above 0, not -1.0"),
    ({"alpha": float("nan")}, "alpha must be above 0, not nan"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: the alpha of 'q_proj' must be above 0, not 0"),
    ({"adapter_dropout": 1.0}, r"adapter_dropout must be in \[0, 1\), not 1.0"),
    ({"adapter_dropout": -0.1}, r"adapter_dropout must be in \[0, 1\), not -0.1"),
    ({"dropout_position": "middle"}, "dropout_position must be one of pre, post, not 'middle'"),
    ({"variant": "fused"}, "variant must be one of nemo, canonical, not 'fused'"),
    ({"column_init_method": "zero"}, "column_init_method must be one of xavier, normal, kaiming, not 'zero'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoraPEFTConfig(**settings)


def test_a_configuration_is_ready_for_json() -> None:
    config = LoraPEFTConfig(adapter_dim=4, rank_pattern={"q_proj": 2})
    assert config.to_dict()["method"] == "lora"
    assert LoraPEFTConfig(**{k: v for k, v in config.to_dict().items() if k != "method"}) == config
