"""What every method keeps: identity at birth, a round trip over the disk, a frozen base, Hugging Face's form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, hf_peft, our_logits, random_tokens

from quiver_peft import (
    GPT,
    T5,
    AdapterError,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
    load_model,
)

TOKENS = random_tokens(2, 12, seed=4)
_PTUNING = PtuningPEFTConfig(virtual_tokens=4, bottleneck_dim=16, embedding_dim=16)
METHODS: dict[str, Any] = {
    "lora": LoraPEFTConfig(adapter_dim=3, target_modules=["all"]),
    "dora": LoraPEFTConfig(adapter_dim=3, target_modules=["all"], use_dora=True),
    "dora, second layer": LoraPEFTConfig(adapter_dim=3, use_dora=True, variant="canonical", layer_selection=[2]),
    "ia3": IA3PEFTConfig(),
    "ia3, two layers": IA3PEFTConfig(layer_selection=[1, 3]),
    "canonical": CanonicalAdaptersPEFTConfig(adapter_dim=5),
    "canonical, post": CanonicalAdaptersPEFTConfig(adapter_dim=5, norm_position="post", activation="gelu"),
    "canonical, bare": CanonicalAdaptersPEFTConfig(adapter_dim=5, norm_position=None, places=["mlp"], bias=True),
    "canonical, tied": CanonicalAdaptersPEFTConfig(adapter_dim=5, weight_tying=True, layer_selection=[1, 2]),
    "canonical, Pfeiffer": CanonicalAdaptersPEFTConfig(adapter_dim=5, places=["mlp"], source="sum", scale=0.5),
    "canonical, parallel": CanonicalAdaptersPEFTConfig(adapter_dim=5, source="residual", scale=4.0),
    "canonical, before bias": CanonicalAdaptersPEFTConfig(
        adapter_dim=5, weight_tying=True, source="output_before_bias"
    ),
    "ptuning": _PTUNING,
    "ptuning, lstm": PtuningPEFTConfig(virtual_tokens=2, encoder="lstm", encoder_hidden_size=8),
    "prompt": PromptTuningPEFTConfig(virtual_tokens=6),
    "prefix": PrefixPEFTConfig(virtual_tokens=3),
    "prefix, projected": PrefixPEFTConfig(virtual_tokens=3, projection=True, encoder_hidden_size=8),
    "ptuning + canonical": [_PTUNING, CanonicalAdaptersPEFTConfig(adapter_dim=5)],
    "all": [
        CanonicalAdaptersPEFTConfig(adapter_dim=2),
        IA3PEFTConfig(),
        _PTUNING,
        PrefixPEFTConfig(virtual_tokens=2),
        LoraPEFTConfig(adapter_dim=2, target_modules=["all"], use_dora=True),
    ],
}
IDENTITIES = [name for name in METHODS if name.startswith(("lora", "dora", "ia3", "canonical"))]
IN_HF_FORM = [n for n in METHODS if not n.startswith("canonical") and not isinstance(METHODS[n], list)]


@pytest.fixture(params=["llama", "gpt2", "t5", "flan"])
def folder(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Path:
    return model_folders[request.param]


def adapted(folder: Path, name: str, *, randomised: bool = True) -> GPT | T5:
    torch.manual_seed(0)
    model = load_model(folder)
    model.add_adapter(METHODS[name])
    generator = torch.Generator().manual_seed(7)
    if randomised:
        for parameter in model.trainable_parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_new_adapter_is_the_base_bit_for_bit(name: str, folder: Path) -> None:
    bare = load_model(folder)
    bare.freeze()  # as it is beneath an adapter: attention may be computed otherwise where its bias is trained
    assert torch.equal(our_logits(adapted(folder, name, randomised=False), TOKENS), our_logits(bare, TOKENS))
    assert_matters(our_logits(adapted(folder, name), TOKENS).detach(), our_logits(bare, TOKENS).detach())


def test_dora_leaves_a_row_of_zeros_alone(folder: Path) -> None:
    """Bases have such rows: pruned ones, heads without a task. A zero row's length is zero, and so is its magnitude."""
    bare = load_model(folder)
    for linear in bare.base.linears():
        linear.weight.data[3] = 0
    bare.freeze()
    expected = our_logits(bare, TOKENS)
    model = load_model(folder)
    for linear in model.base.linears():
        linear.weight.data[3] = 0
    model.add_adapter(METHODS["dora"])
    logits = our_logits(model, TOKENS)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.trainable_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_adapter_learns(name: str, folder: Path) -> None:
    model = adapted(folder, name)
    our_logits(model, TOKENS).square().mean().backward()
    for key, parameter in model.named_parameters():
        if key.startswith("base."):
            assert not parameter.requires_grad and parameter.grad is None, key
        else:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), key


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_adapter_comes_back_as_it_was(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, name).eval()
    revision = model.save_adapter(tmp_path / "a")
    again = load_model(folder)
    again.load_adapters(tmp_path / "a")
    assert_close(our_logits(again.eval(), TOKENS).detach(), our_logits(model, TOKENS).detach(), tolerance=1e-5)
    for stack in ("", "encoder", "decoder"):
        assert again.num_virtual_in(stack) == model.num_virtual_in(stack)
    assert again.save_adapter(tmp_path / "b") == revision, "what was read is written alike"
    methods = json.loads((tmp_path / "a" / "quiver.json").read_text())["methods"]
    expected = METHODS[name] if isinstance(METHODS[name], list) else [METHODS[name]]
    assert {item["method"] for item in methods} == {config.to_dict()["method"] for config in expected}


@pytest.mark.parametrize("name", IN_HF_FORM)
def test_peft_loads_what_we_wrote(name: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, name).eval()
    model.save_adapter(tmp_path)
    theirs = hf_peft(folder, tmp_path)
    # With a cache, as a prefix lives in one; without the rows of virtual tokens.
    logits = hf_logits(theirs, TOKENS, use_cache=True)[:, -TOKENS.shape[1] :]
    assert_close(our_logits(model, TOKENS).detach(), logits)
    assert_matters(logits, hf_logits(hf_model(folder), TOKENS))


def test_tied_bottlenecks_stay_tied(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, "canonical, tied")
    count = sum(parameter.numel() for parameter in model.trainable_parameters())
    num_stacks = 2 if isinstance(model, T5) else 1
    assert count == num_stacks * 2 * (2 * 5 * 64 + 2 * 64), "one bottleneck and its norm for each place"
    model.save_adapter(tmp_path)
    again = load_model(folder)
    again.load_adapters(tmp_path)
    assert sum(parameter.numel() for parameter in again.adapter.parameters()) == count  # pyright: ignore[reportOptionalMemberAccess]


def test_the_order_of_the_list_does_not_matter(folder: Path) -> None:
    outputs: list[torch.Tensor] = []
    for configs in ([IA3PEFTConfig(), METHODS["lora"]], [METHODS["lora"], IA3PEFTConfig()]):
        torch.manual_seed(0)
        model = load_model(folder)
        model.add_adapter(configs)
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
        outputs.append(our_logits(model, TOKENS).detach())
    assert torch.equal(*outputs)


REFUSED: list[tuple[Any, str]] = [
    (LoraPEFTConfig(layer_selection=[0]), "layer_selection: 0 is no layer of this base; they are numbered 1 to 3"),
    (IA3PEFTConfig(layer_selection=[4]), "layer_selection: 4 is no layer"),
    (CanonicalAdaptersPEFTConfig(layer_selection=[]), "layer_selection is empty"),
    (PromptTuningPEFTConfig(virtual_tokens=255), "255 leave no room for a prompt and an answer in the 256 positions"),
    (PrefixPEFTConfig(virtual_tokens=256), "256 leave no room"),
    ([IA3PEFTConfig(), IA3PEFTConfig()], "each method at most once, not ia3, ia3"),
    ([_PTUNING, PromptTuningPEFTConfig()], "each method at most once, not ptuning, prompt_tuning"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_does_not_fit_the_base_is_refused(config: Any, message: str, model_folders: dict[str, Path]) -> None:
    for family in ("llama", "gpt2"):
        with pytest.raises(AdapterError, match=message):
            load_model(model_folders[family]).add_adapter(config)


@pytest.mark.parametrize("family", ["t5", "flan"])
def test_cross_attention_is_adapted_where_it_is_named(family: str, model_folders: dict[str, Path]) -> None:
    bare = our_logits(load_model(model_folders[family]), TOKENS).detach()
    configs = (
        LoraPEFTConfig(adapter_dim=3, target_modules=["cross_attention"]),
        LoraPEFTConfig(adapter_dim=3, target_modules=["EncDecAttention.v"], variant="canonical"),
        CanonicalAdaptersPEFTConfig(adapter_dim=3, places=["cross_attention"]),
    )
    for config in configs:
        model = load_model(model_folders[family])
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        assert_matters(our_logits(model, TOKENS).detach(), bare)
        assert model.adapter is not None
        weights = model.adapter.weights(model.base)
        sites = [item.target.site for item in weights.lora] + [item.site for item in weights.bottlenecks]
        assert sites and all(".cross_attention" in site and site.startswith("decoder.") for site in sites)


def test_a_decoder_has_no_cross_attention(folder: Path) -> None:
    model = load_model(folder)
    if isinstance(model, T5):
        return
    with pytest.raises(AdapterError, match="places: this base has no cross_attention"):
        model.add_adapter(CanonicalAdaptersPEFTConfig(places=["mlp", "cross_attention"]))
    with pytest.raises(AdapterError, match="target_modules: 'cross_attention' matches no linear of this base"):
        model.add_adapter(LoraPEFTConfig(target_modules=["cross_attention"]))


IMPOSSIBLE: list[tuple[Any, dict[str, Any], str]] = [
    (PtuningPEFTConfig, {"virtual_tokens": 0}, "virtual_tokens must be at least 1, not 0"),
    (PtuningPEFTConfig, {"encoder": "gru"}, "encoder must be one of nemo, mlp, lstm, not 'gru'"),
    (PtuningPEFTConfig, {"bottleneck_dim": 0}, "bottleneck_dim must be at least 1, not 0"),
    (PtuningPEFTConfig, {"init_std": 0.0}, "init_std must be above 0, not 0.0"),
    (PtuningPEFTConfig, {"encoder_dropout": 1.0}, r"encoder_dropout must be in \[0, 1\), not 1.0"),
    (PromptTuningPEFTConfig, {"init": "text"}, "init must be one of vocabulary, random, not 'text'"),
    (PrefixPEFTConfig, {"virtual_tokens": -1}, "virtual_tokens must be at least 1, not -1"),
    (PrefixPEFTConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size must be at least 1, not 0"),
    (IA3PEFTConfig, {"feedforward_modules": ["down_proj"]}, "feedforward_modules needs target_modules"),
    (CanonicalAdaptersPEFTConfig, {"adapter_dim": 0}, "adapter_dim must be at least 1, not 0"),
    (CanonicalAdaptersPEFTConfig, {"activation": "tanh"}, "activation must be one of swish, relu, gelu, gelu_tanh"),
    (
        CanonicalAdaptersPEFTConfig,
        {"places": ["head"]},
        r"places must be among attention, mlp, cross_attention, not \['head'\]",
    ),
    (CanonicalAdaptersPEFTConfig, {"norm_position": "both"}, "norm_position must be one of pre, post, None"),
    (CanonicalAdaptersPEFTConfig, {"scale": float("nan")}, "scale must be a number other than 0, not nan"),
]


@pytest.mark.parametrize(("config", "settings", "message"), IMPOSSIBLE)
def test_impossible_settings_are_refused(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        config(**settings)
