"""Folders of every method but LoRA, damaged: each is refused by name, and the model stays as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import edit_json, edit_tensors, random_tokens, tiny_llama
from torch import Tensor

from quiver_peft import (
    GPT,
    AdapterError,
    BaseMismatchError,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
)

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "quiver.json"
TOKENS = random_tokens(1, 6, seed=5)
MADE: dict[str, Any] = {
    "ia3": IA3PEFTConfig(),
    "ptuning": PtuningPEFTConfig(virtual_tokens=4, bottleneck_dim=8, embedding_dim=8),
    "prompt": PromptTuningPEFTConfig(virtual_tokens=4),
    "prefix": PrefixPEFTConfig(virtual_tokens=4),
    "canonical": CanonicalAdaptersPEFTConfig(adapter_dim=4),
    "tied": CanonicalAdaptersPEFTConfig(adapter_dim=4, weight_tying=True),
    "both": [LoraPEFTConfig(adapter_dim=2), IA3PEFTConfig()],
}


@pytest.fixture(scope="module")
def good(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good adapter of each kind, without the record, which would notice any change first."""
    folders: dict[str, Path] = {}
    for name, config in MADE.items():
        model = GPT.from_pretrained(llama_folder)
        model.add_adapter(config)
        folders[name] = tmp_path_factory.mktemp(name) / "adapter"
        model.save_adapter(folders[name])
        (folders[name] / RECORD).unlink()
    return folders


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> GPT:
    return GPT.from_pretrained(llama_folder)


def _pop(ending: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(ending)))


def _put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


K0 = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
TENSOR_FAULTS: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    ("ia3", _pop("0.self_attn.k_proj.ia3_l"), "ia3_l of 'model.layers.0.self_attn.k_proj' is missing"),
    ("ia3", _put("base_model.model.model.layers.0.self_attn.q_proj.ia3_l", 64, 1), "q_proj' is not among target_mod"),
    ("ia3", _put("base_model.model.model.layers.7.self_attn.k_proj.ia3_l", 32, 1), "k_proj' does not exist in this"),
    ("ia3", _put("base_model.model.lm_head.weight", 320, 64), "lm_head.weight' is not an ia3_l; nothing may be left"),
    ("ia3", _put(K0, 1, 32), r"ia3_l of the module 'model.layers.0.self_attn.k_proj' has shape \[1, 32\]; .*\[32, 1\]"),
    ("ia3", _put(K0, 64, 1), r"has shape \[64, 1\]; this base has \[32, 1\]"),
    ("prompt", _pop("prompt_embeddings"), r"must hold 'prompt_embeddings' and nothing else, not \[\]"),
    ("ptuning", _put("word_embeddings", 4, 64), r"not \['prompt_embeddings', 'word_embeddings'\]"),
    (
        "prompt",
        _put("prompt_embeddings", 5, 64),
        r"has shape \[5, 64\]; by num_virtual_tokens of adapter_config.json it must have 4 rows",
    ),
    ("ptuning", _put("prompt_embeddings", 4, 48), "has rows of 48 numbers, this base needs 64"),
    ("prefix", _put("prompt_embeddings", 4, 64), "has rows of 64 numbers, this base needs 192"),
    ("canonical", _pop("layers.1.mlp.up.weight"), "tensor 'layers.1.mlp.up.weight' is missing"),
    (
        "canonical",
        _put("layers.1.mlp.up.bias", 64),
        "tensor 'layers.1.mlp.up.bias' has no place by adapter_config.json",
    ),
    (
        "canonical",
        _put("layers.1.mlp.up.weight", 64, 5),
        r"'layers.1.mlp.up.weight' has shape \[64, 5\], not \[64, 4\]",
    ),
    ("tied", lambda tensors: tensors["layers.1.mlp.up.weight"].add_(1), "weight_tying is set, but the layers' bott"),
    ("both", _pop("0.self_attn.k_proj.ia3_l"), "method 'ia3': .*ia3_l of .* is missing"),
    ("both", _pop("0.self_attn.q_proj.lora_A.weight"), "method 'lora': .*lora_A and lora_B of .* must both be there"),
    ("both", _put("ptuning.prompt_embeddings", 4, 64), "'ptuning.prompt_embeddings' belongs to no method of adapter_c"),
]


@pytest.mark.parametrize(("name", "damage", "message"), TENSOR_FAULTS)
def test_damaged_tensors(
    name: str,
    damage: Callable[[dict[str, Tensor]], object],
    message: str,
    good: dict[str, Path],
    model: GPT,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "a"))
    edit_tensors(folder / WEIGHTS, damage)
    refused(model, folder, message)


CONFIG_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("ia3", {"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
    ("ia3", {"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' is not supported; use CAUSAL_LM"),
    ("ia3", {"target_modules": ["c_attn"]}, "match no linear of this base"),
    ("ia3", {"target_modules": []}, r"target_modules \[\] match no linear of this base"),
    ("ia3", {"target_modules": 7}, "target_modules or feedforward_modules are malformed"),
    ("ia3", {"target_modules": "("}, "target_modules or feedforward_modules are malformed"),
    ("ia3", {"feedforward_modules": ["k_proj"]}, "'model.layers.0.self_attn.k_proj' shares its input with other"),
    ("prompt", {"num_virtual_tokens": "4"}, "num_virtual_tokens must be a positive whole number, not '4'"),
    ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens must be a positive whole number, not None"),
    ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules = 2: this base has 1"),
    ("prefix", {"num_layers": 4}, "num_layers 4 is another base's; this one has 3"),
    ("prefix", {"some_new_field": 1}, "some_new_field = 1 is not supported"),
    ("canonical", {"hidden_size": 32}, "hidden_size 32 is another base's; this one has 64"),
    ("canonical", {"adapter_dim": "4"}, "adapter_dim = '4' has the wrong type"),
    ("canonical", {"adapter_dim": ...}, "adapter_dim is missing"),
    ("canonical", {"activation": "tanh"}, "activation must be one of swish, relu, gelu, gelu_tanh, not 'tanh'"),
    ("canonical", {"places": "mlp"}, "places must be a list of str, not 'mlp'"),
    ("canonical", {"layer_selection": [4]}, "layer_selection: 4 is no layer of this base"),
    ("canonical", {"layer_selection": ["1"]}, r"layer_selection must be a list of int, not \['1'\]"),
    ("canonical", {"phm_dim": 4}, "phm_dim = 4 is not a field of QUIVER_BOTTLENECK"),
    ("both", {"methods": {}}, "methods must be an object of at least two methods, not {}"),
    ("both", {"methods": {"lora": {}, "vera": {}}}, r"methods\['vera'\] is not known; they are prefix, ptuning"),
    ("both", {"methods": {"lora": 3, "ia3": {}}}, r"methods\['lora'\] is not known"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONFIG_FAULTS)
def test_damaged_configurations(
    name: str, changes: dict[str, Any], message: str, good: dict[str, Path], model: GPT, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "a"))
    edit_json(folder / CONFIG, **changes)
    refused(model, folder, message)


def test_a_method_under_another_ones_name(good: dict[str, Path], model: GPT, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["both"], tmp_path / "a"))
    methods = json.loads((folder / CONFIG).read_text())["methods"]
    edit_json(folder / CONFIG, methods={"prefix": methods["ia3"], "lora": methods["lora"]})
    edit_tensors(folder / WEIGHTS, _rename_ia3)
    refused(model, folder, r"methods\['prefix'\] holds 'ia3'")


def _rename_ia3(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("ia3.")]:
        tensors["prefix." + name.removeprefix("ia3.")] = tensors.pop(name)


@pytest.mark.parametrize("name", MADE)
def test_another_base(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", hidden_size=32, intermediate_size=48)
    with pytest.raises(BaseMismatchError):
        GPT.from_pretrained(tmp_path / "base").load_adapters(good[name])


def refused(model: GPT, folder: Path, message: str) -> None:
    before = model(TOKENS)
    with pytest.raises(AdapterError, match=message) as caught:
        model.load_adapters(folder)
    assert str(folder) in str(caught.value)
    assert model.adapter is None and torch.equal(model(TOKENS), before)
