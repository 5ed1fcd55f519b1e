"""Adapters made by `add_adapter` and saved: Hugging Face PEFT loads them and gives our logits, and so do we."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, hf_peft, our_logits, random_tokens
from torch import Tensor

from quiver_peft import GPT, T5, LoraPEFTConfig, load_model
from quiver_peft.adapters.methods.lora import LoraModule
from quiver_peft.adapters.methods.targets import NEMO_PLACES

TOKENS = random_tokens(2, 40)
VARIANTS = ("nemo", "canonical")
PLACES = [
    (family, variant, place)
    for family in ("llama", "gpt2", "t5", "flan")
    for variant in VARIANTS
    for place in NEMO_PLACES
    if place != "cross_attention" or family in ("t5", "flan")
]
OTHER: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "variant": "canonical", "alpha": 3.0}),
    ("llama", {"target_modules": ["gate_proj"], "use_rslora": True, "alpha": 9}),
    ("llama", {"target_modules": r".*\.[01]\.self_attn\.[kv]_proj", "variant": "canonical"}),
    ("llama", {"target_modules": ["model.layers.2.mlp.down_proj"], "alpha": 0.5}),
    ("llama", {"target_modules": ["attention_qkv", "mlp_fc2"], "use_rslora": True, "alpha": 20}),
    ("llama", {"target_modules": ["attention_qkv", "attention"], "adapter_dim": 2}),
    ("llama", {"target_modules": ["attention", "mlp"], "variant": "canonical", "adapter_dim": 1}),
    (
        "llama",
        {
            "target_modules": "all",
            "variant": "canonical",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9},
            "alpha_pattern": {"v_proj": 1.0, r"layers\.0\.self_attn\.o_proj": 12.5},
        },
    ),
    ("t5", {"target_modules": ["q", "v"], "variant": "canonical", "alpha": 3.0}),
    ("flan", {"target_modules": ["EncDecAttention.k", "wi_1", "decoder.block.2.layer.0.SelfAttention.o"]}),
    ("gpt2", {"target_modules": ["c_attn"], "alpha": 3.0}),
    ("gpt2", {"target_modules": ["c_proj"], "variant": "canonical"}),
    ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"], "rank_pattern": {"c_fc": 2}}),
    ("gpt2", {"target_modules": ["attention_qkv"], "use_rslora": True, "rank_pattern": {"c_attn": 3}}),
]


def randomised(folder: Path, seed: int = 0, **settings: Any) -> GPT | T5:
    """A model with a new adapter whose weights are no longer those of its birth."""
    model = load_model(folder)
    torch.manual_seed(seed)
    values: dict[str, Any] = {"adapter_dim": 4, "alpha": 8.0, **settings}
    model.add_adapter(LoraPEFTConfig(**values))
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _lora(model: GPT | T5) -> LoraModule:
    assert model.adapter is not None
    assert model.adapter.lora is not None
    return model.adapter.lora


def _check(folder: Path, out: Path, settings: dict[str, Any]) -> None:
    model = randomised(folder, **settings)
    model.save_adapter(out)
    model.freeze()
    ours = our_logits(model, TOKENS)
    assert_matters(ours, hf_logits(hf_model(folder), TOKENS))
    assert_close(hf_logits(hf_peft(folder, out), TOKENS), ours)
    again = load_model(folder)
    again.load_adapters(out)
    again.freeze()
    assert_close(our_logits(again, TOKENS), ours, tolerance=1e-5)


@pytest.mark.parametrize(("family", "variant", "place"), PLACES)
def test_nemo_places(family: str, variant: str, place: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    _check(model_folders[family], tmp_path / "a", {"target_modules": [place], "variant": variant})


@pytest.mark.parametrize("case", range(len(OTHER)))
def test_other_configurations(case: int, model_folders: dict[str, Path], tmp_path: Path) -> None:
    family, settings = OTHER[case]
    _check(model_folders[family], tmp_path / "a", settings)


def _state(model: GPT | T5) -> dict[str, Tensor]:
    return {w.target.name + factor: t for w in _lora(model).weights() for factor, t in (("a", w.a), ("b", w.b))}


@pytest.mark.parametrize(("family", "variant", "place"), [case for case in PLACES if case[2] == "all"])
def test_a_round_trip_keeps_every_bit(
    family: str, variant: str, place: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = randomised(model_folders[family], target_modules=[place], variant=variant)
    first = model.save_adapter(tmp_path / "first")
    again = load_model(model_folders[family])
    again.load_adapters(tmp_path / "first")
    before, after = _state(model), _state(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    second = again.save_adapter(tmp_path / "second")
    first_tensors, second_tensors = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    assert first_tensors.keys() == second_tensors.keys()
    assert all(torch.equal(first_tensors[name], second_tensors[name]) for name in first_tensors)
    assert first == second


def test_a_fused_a_is_written_for_each_module_and_fused_again(llama_folder: Path, tmp_path: Path) -> None:
    model = randomised(llama_folder, target_modules=["all"], variant="nemo")
    assert len(_lora(model).weights()) == 3 * 4
    model.save_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_A.weight"
    assert torch.equal(tensors[name.format("q")], tensors[name.format("k")])
    again = load_model(llama_folder)
    again.load_adapters(tmp_path / "a")
    assert [w.target.name for w in _lora(again).weights()][:2] == ["layers.0.attention.qkv", _OUT]
    assert len(_lora(again).weights()) == 3 * 4


_OUT = "model.layers.0.self_attn.o_proj"


def test_separate_as_stay_separate(llama_folder: Path, tmp_path: Path) -> None:
    model = randomised(llama_folder, target_modules=["attention_qkv"], variant="canonical")
    model.save_adapter(tmp_path / "a")
    again = load_model(llama_folder)
    again.load_adapters(tmp_path / "a")
    assert len(_lora(again).weights()) == len(_lora(model).weights()) == 3 * 3


@pytest.mark.parametrize(
    ("family", "places", "written"),
    [
        ("llama", ["attention_qkv"], ["k_proj", "q_proj", "v_proj"]),
        ("llama", ["mlp_fc1"], ["gate_proj", "up_proj"]),
        ("gpt2", ["attention_dense"], ["attn.c_proj"]),
        ("gpt2", ["mlp"], ["mlp.c_fc", "mlp.c_proj"]),
        ("gpt2", ["attention_dense", "mlp_fc2"], ["c_proj"]),
        ("llama", ["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_the_shortest_module_names_that_mean_just_these_are_written(
    family: str, places: list[str], written: list[str], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    randomised(model_folders[family], target_modules=places).save_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == written


def test_the_configuration_says_what_was_trained(gpt2_folder: Path, tmp_path: Path) -> None:
    model = randomised(gpt2_folder, target_modules=["c_fc"], use_rslora=True, adapter_dropout=0.25)
    model.save_adapter(tmp_path / "a", base_name="some/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": ["c_fc"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_the_training_goes_on_as_it_was_configured(llama_folder: Path, tmp_path: Path) -> None:
    """Dropout and its position, the variant and the start come back with the adapter: resuming changes nothing."""
    model = randomised(
        llama_folder, target_modules=["mlp"], variant="nemo", adapter_dropout=0.3, dropout_position="post"
    )
    model.save_adapter(tmp_path / "a")
    again = load_model(llama_folder)
    again.load_adapters(tmp_path / "a")
    assert _lora(again).config.adapter_dropout == 0.3
    assert _lora(again).config.dropout_position == "post"
