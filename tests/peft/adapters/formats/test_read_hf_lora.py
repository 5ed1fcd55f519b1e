"""LoRAs that Hugging Face PEFT itself made and saved give PEFT's own logits when we load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import (
    assert_close,
    assert_matters,
    edit_json,
    hf_logits,
    hf_lora,
    hf_model,
    hf_peft,
    our_logits,
    random_tokens,
)

from quiver_peft import GPT, load_model

TOKENS = random_tokens(2, 40)
Q_V = ["q_proj", "v_proj"]
ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Arguments of `hf_lora` and how many modules of the checkpoint get a LoRA.
LLAMA: dict[str, tuple[dict[str, Any], int]] = {
    "q, v": ({"targets": Q_V}, 6),
    "all-linear": ({"targets": "all-linear"}, 21),
    "all by name": ({"targets": ALL_LLAMA, "rank": 3, "alpha": 5}, 21),
    "rank 1": ({"targets": Q_V, "rank": 1}, 6),
    "rank over the heads": ({"targets": Q_V, "rank": 48}, 6),
    "k alone": ({"targets": ["k_proj"]}, 3),
    "gate alone": ({"targets": ["gate_proj"]}, 3),
    "fractional alpha": ({"targets": Q_V, "alpha": 2.5}, 6),
    "regular expression": ({"targets": r".*layers\.[02]\.(self_attn\.[qo]|mlp\.down)_proj"}, 6),
    "full names": ({"targets": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]}, 2),
    "layers_to_transform": ({"targets": Q_V, "layers_to_transform": [0, 2]}, 4),
    "layers_to_transform, one": ({"targets": Q_V, "layers_to_transform": 1}, 2),
    "layers_pattern": ({"targets": Q_V, "layers_to_transform": [1], "layers_pattern": "layers"}, 2),
    "layers_pattern, several": ({"targets": Q_V, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, 2),
    "full name despite layers_to_transform": (
        {"targets": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [2]},
        2,
    ),
    "exclude_modules": ({"targets": ALL_LLAMA, "exclude_modules": ["v_proj", "layers.1.mlp.up_proj"]}, 17),
    "exclude_modules, expression": ({"targets": ALL_LLAMA, "exclude_modules": r".*\.1\..*"}, 14),
    "rank_pattern": (
        {"targets": ALL_LLAMA, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7, r"layers\.2\.mlp\..*": 5}},
        21,
    ),
    "alpha_pattern": ({"targets": ALL_LLAMA, "alpha_pattern": {"v_proj": 1, "layers.1.self_attn.o_proj": 32}}, 21),
    "both patterns": ({"targets": Q_V, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}, 6),
    "rslora": ({"targets": Q_V, "rank": 9, "use_rslora": True}, 6),
    "rslora, patterns": (
        {"targets": Q_V, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        6,
    ),
    "trained with dropout": ({"targets": Q_V, "lora_dropout": 0.1}, 6),
    "gaussian start": ({"targets": Q_V, "init_lora_weights": "gaussian"}, 6),
    "orthogonal start": ({"targets": Q_V, "init_lora_weights": "orthogonal"}, 6),
    "saved in bf16": ({"targets": Q_V, "save_dtype": torch.bfloat16}, 6),
    "saved in fp16": ({"targets": Q_V, "save_dtype": torch.float16}, 6),
}
GPT2: dict[str, tuple[dict[str, Any], int]] = {
    "c_attn": ({"targets": ["c_attn"]}, 3),
    "c_proj, both": ({"targets": ["c_proj"]}, 6),
    "attn.c_proj": ({"targets": ["attn.c_proj"]}, 3),
    "c_fc, rslora": ({"targets": ["c_fc"], "use_rslora": True}, 3),
    "all-linear": ({"targets": "all-linear"}, 12),
    "regular expression": ({"targets": r"transformer\.h\.[01]\.mlp\.c_(fc|proj)"}, 4),
    "layers_to_transform": ({"targets": ["c_attn"], "layers_to_transform": [1]}, 1),
    "layers_pattern": ({"targets": ["c_attn"], "layers_to_transform": [0, 1], "layers_pattern": "h"}, 2),
    "exclude_modules": ({"targets": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]}, 6),
    "patterns": (
        {"targets": ["c_attn", "c_proj"], "rank_pattern": {"mlp.c_proj": 2}, "alpha_pattern": {"c_attn": 3}},
        9,
    ),
    "saved in bf16": ({"targets": ["c_attn", "c_fc"], "save_dtype": torch.bfloat16}, 6),
}


T5: dict[str, tuple[dict[str, Any], int]] = {
    "q, v, of cross-attention too": ({"targets": ["q", "v"]}, 18),
    "all-linear": ({"targets": "all-linear", "alpha": 5}, 0),
    "cross-attention alone": ({"targets": ["EncDecAttention.k", "EncDecAttention.o"]}, 6),
    "rslora": ({"targets": ["q", "v", "wo"], "rank": 9, "use_rslora": True}, 24),
    "patterns": (
        {"targets": ["k", "o"], "rank_pattern": {"EncDecAttention.k": 2}, "alpha_pattern": {"SelfAttention.o": 3}},
        18,
    ),
    "layers_to_transform": ({"targets": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}, 3),
}


def _check(model_folder: Path, out: Path, arguments: dict[str, Any], num_modules: int) -> None:
    expected = hf_logits(hf_lora(model_folder, out, **arguments), TOKENS)
    assert_matters(expected, hf_logits(hf_model(model_folder), TOKENS))
    model = load_model(model_folder)
    model.load_adapters(out)
    model.freeze()
    assert_close(our_logits(model, TOKENS), expected)
    assert model.adapter is not None
    assert model.adapter.lora is not None
    assert len(model.adapter.lora.weights()) == num_modules


@pytest.mark.parametrize("case", LLAMA)
def test_llama(case: str, llama_folder: Path, tmp_path: Path) -> None:
    _check(llama_folder, tmp_path, *LLAMA[case])


@pytest.mark.parametrize("case", GPT2)
def test_gpt2(case: str, gpt2_folder: Path, tmp_path: Path) -> None:
    _check(gpt2_folder, tmp_path, *GPT2[case])


@pytest.mark.parametrize("family", ["t5", "flan"])
@pytest.mark.parametrize("case", T5)
def test_t5(case: str, family: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments, num_modules = T5[case]
    # A gated feed-forward has a linear more in each of the six layers.
    all_linears = 36 + 12 + 6 * (family == "flan")
    _check(model_folders[family], tmp_path, arguments, num_modules or all_linears)


def test_configs_of_older_peft_versions_lack_newer_fields(llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path)
    old = ("r", "lora_alpha", "target_modules", "peft_type", "task_type", "bias", "lora_dropout", "fan_in_fan_out")
    edit_json(tmp_path / "adapter_config.json", **{key: ... for key in _keys(tmp_path) if key not in old})
    expected = hf_logits(hf_peft(llama_folder, tmp_path), TOKENS)
    model = GPT.from_pretrained(llama_folder)
    model.load_adapters(tmp_path)
    assert_close(model(TOKENS).detach(), expected)


def _keys(folder: Path) -> list[str]:
    return list(json.loads((folder / "adapter_config.json").read_text()))


def test_another_adapter_takes_the_place_of_the_first(llama_folder: Path, tmp_path: Path) -> None:
    first = hf_logits(hf_lora(llama_folder, tmp_path / "a", seed=1), TOKENS)
    second = hf_logits(hf_lora(llama_folder, tmp_path / "b", seed=2, rank=7), TOKENS)
    assert_matters(second, first)
    model = GPT.from_pretrained(llama_folder)
    for folder, expected in (("a", first), ("b", second), ("a", first)):
        model.load_adapters(tmp_path / folder)
        assert_close(model(TOKENS).detach(), expected)


def test_adapters_stay_in_fp32_beside_a_half_precision_base(llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path)
    model = GPT.from_pretrained(llama_folder, dtype=torch.bfloat16)
    model.load_adapters(tmp_path)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16
