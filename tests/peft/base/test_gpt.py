"""The base's logits against transformers, on the same tiny random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, random_tokens, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from quiver_peft import GPT
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.sites import Linear, Site

TOKENS = random_tokens(2, 60)
LLAMA_SETTINGS: dict[str, dict[str, Any]] = {
    "gqa, untied": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "all biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "another norm eps": {"rms_norm_eps": 1e-2},
    "gelu": {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
}
GPT2_SETTINGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "own feed-forward size": {"n_inner": 96},
    "another norm eps": {"layer_norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("setting", LLAMA_SETTINGS)
def test_llama_logits_equal_transformers(setting: str, tmp_path: Path) -> None:
    _check(tiny_llama, tmp_path, LLAMA_SETTINGS[setting])


@pytest.mark.parametrize("setting", GPT2_SETTINGS)
def test_gpt2_logits_equal_transformers(setting: str, tmp_path: Path) -> None:
    _check(tiny_gpt2, tmp_path, GPT2_SETTINGS[setting])


def _check(make: Callable[..., nn.Module], folder: Path, settings: dict[str, Any]) -> None:
    expected = _their_logits(make, folder / "it", settings)
    if settings:
        # The setting is one that matters: the model without it answers otherwise.
        assert_matters(expected, _their_logits(make, folder / "plain", {}))
    assert_close(_our_logits(folder / "it"), expected)


def _their_logits(make: Callable[..., nn.Module], folder: Path, settings: dict[str, Any]) -> Tensor:
    make(folder, **settings)
    return hf_logits(hf_model(folder), TOKENS)


def _our_logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return GPT.from_pretrained(folder)(TOKENS)


def test_gpt2_tells_the_exact_gelu_from_the_approximate_one(tmp_path: Path) -> None:
    """They are so close (1e-3 on these logits) that only a tighter tolerance tells them apart."""
    exact = _their_logits(tiny_gpt2, tmp_path / "exact", {"activation_function": "gelu"})
    approximate = _their_logits(tiny_gpt2, tmp_path / "approximate", {"activation_function": "gelu_pytorch_tanh"})
    assert (exact - approximate).abs().max() > 5e-4
    assert_close(_our_logits(tmp_path / "exact"), exact, tolerance=1e-5)
    assert_close(_our_logits(tmp_path / "approximate"), approximate, tolerance=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_matter_to_the_tiny_models(family: str, model_folders: dict[str, Path]) -> None:
    """The power of every other comparison here: one position off moves the logits a thousand tolerances."""
    base = GPTBase.from_pretrained(model_folders[family])
    tokens = random_tokens(1, 40)
    # Rotary positions are relative: shift one half only.
    shifted = torch.arange(40)[None] + (torch.arange(40) >= 20)[None]
    with torch.inference_mode():
        assert_matters(base.logits(base(tokens, shifted)), base.logits(base(tokens)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_right_padding_changes_no_real_row(family: str, model_folders: dict[str, Path]) -> None:
    model = GPT.from_pretrained(model_folders[family])
    tokens = random_tokens(1, 30)
    padded = torch.cat((tokens, random_tokens(1, 10, seed=1)), dim=1)
    with torch.inference_mode():
        assert_close(model(padded)[:, :30], model(tokens), tolerance=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_follows_transformers_half_precision(family: str, model_folders: dict[str, Path]) -> None:
    folder, tokens = model_folders[family], random_tokens(1, 30)
    exact = hf_logits(hf_model(folder), tokens)
    theirs = hf_logits(hf_model(folder, dtype=torch.bfloat16), tokens)
    with torch.inference_mode():
        ours = GPT.from_pretrained(folder, dtype=torch.bfloat16)(tokens)
    assert ours.dtype == torch.bfloat16
    error, their_error = (ours.float() - exact).abs().max(), (theirs.float() - exact).abs().max()
    assert error <= 2 * their_error


def test_sites_are_named_and_unique(llama_folder: Path) -> None:
    linears = list(GPTBase.from_pretrained(llama_folder).linears())
    assert [linear.site.name for linear in linears[:4]] == [
        "layers.0.attention.qkv",
        "layers.0.attention.out",
        "layers.0.mlp.up",
        "layers.0.mlp.down",
    ]
    assert len({linear.site.name for linear in linears}) == len(linears) == 12
    assert linears[4].site == Site("layers.1.attention.qkv", "attention.qkv", 1)


def test_a_fused_linear_splits_into_its_parts() -> None:
    linear = Linear(Site.in_layer(0, "attention.qkv"), 8, {"q": 8, "k": 4, "v": 2}, bias=False)
    y = torch.arange(14.0)
    assert linear.parts == {"q": (0, 8), "k": (8, 12), "v": (12, 14)}
    assert [part.tolist() for part in linear.split(y)] == [y[:8].tolist(), y[8:12].tolist(), y[12:].tolist()]


def test_checkpoint_names_mean_parts_of_linears(model_folders: dict[str, Path]) -> None:
    llama = GPTBase.from_pretrained(model_folders["llama"]).checkpoint_linears()
    assert len(llama) == 3 * 7
    linear, part = llama["model.layers.1.self_attn.v_proj"]
    assert (linear.site.name, part) == ("layers.1.attention.qkv", "v")
    gpt2 = GPTBase.from_pretrained(model_folders["gpt2"]).checkpoint_linears()
    assert len(gpt2) == 3 * 4
    linear, part = gpt2["transformer.h.2.mlp.c_proj"]
    assert (linear.site.name, part) == ("layers.2.mlp.down", "")
