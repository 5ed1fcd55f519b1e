"""Folders that are no base: each is refused with a message that names the file, the tensor or field, and the rule."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import edit_json, edit_tensors, hf_model
from torch import Tensor

from quiver_peft import GPT, CheckpointError, QuiverError


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path) -> Path:
    """A copy of the tiny Llama that the test may break."""
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


def refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        GPT.from_pretrained(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert isinstance(caught.value, QuiverError)


UP = "model.layers.1.mlp.up_proj.weight"

TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(UP), ("1 tensors are missing", f"{UP!r}")),
    "several missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.")],
        ("9 tensors are missing, the first is 'model.layers.2.",),
    ),
    "left over": (
        lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
        ("tensor 'model.layers.0.self_attn.q_norm.weight' has no place in this architecture",),
    ),
    "a layer too many": (
        lambda t: t.update({UP.replace(".1.", ".3."): t[UP].clone()}),
        ("tensor 'model.layers.3.mlp.up_proj.weight' has no place in this architecture",),
    ),
    "an unexpected bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ("tensor 'model.layers.0.self_attn.q_proj.bias' has no place in this architecture",),
    ),
    "misshapen": (
        lambda t: t.update({UP: t[UP][:, :-1].contiguous()}),
        (f"tensor {UP!r} has shape [96, 63], config.json says [96, 64]",),
    ),
    "transposed": (
        lambda t: t.update({UP: t[UP].T.contiguous()}),
        (f"tensor {UP!r} has shape [64, 96], config.json says [96, 64]",),
    ),
    "renamed": (
        lambda t: t.update({UP.replace("up_proj", "w3"): t.pop(UP)}),
        ("tensor 'model.layers.1.mlp.w3.weight' has no place",),
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), ("1 tensors are missing, the first is 'lm_head.weight'",)),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_must_be_exactly_those_of_the_architecture(fault: str, folder: Path) -> None:
    edit, fragments = TENSOR_FAULTS[fault]
    edit_tensors(folder / "model.safetensors", edit)
    refused(folder, str(folder), *fragments)


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown model_type": (
        {"model_type": "bert"},
        ("model_type 'bert' is not supported; known: llama, mistral, qwen2, qwen3, nemotron, gpt2",),
    ),
    "no model_type": ({"model_type": ...}, ("model_type None is not supported",)),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        ("quantization_config is not supported; use plain weights",),
    ),
    "activation": ({"hidden_act": "mish"}, ("hidden_act 'mish' is not supported; known: silu, swish, gelu",)),
    "heads": (
        {"num_key_value_heads": 3},
        ("num_attention_heads 4 is not a multiple of num_key_value_heads 3",),
    ),
    "lacking field": ({"num_hidden_layers": ...}, ("lacks the field 'num_hidden_layers'",)),
    "malformed field": ({"vocab_size": "many"}, ("a field is malformed", "many")),
    "null field": ({"hidden_size": None}, ("a field is malformed",)),
    "malformed stop token": ({"eos_token_id": "</s>"}, ("a token id must be a number or a list of numbers",)),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_configuration_we_do_not_know_is_refused(fault: str, folder: Path) -> None:
    changes, fragments = CONFIG_FAULTS[fault]
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **changes)
    refused(folder, *fragments)


@pytest.mark.parametrize(
    ("key", "value", "only"),
    [
        ("scale_attn_by_inverse_layer_idx", True, False),
        ("scale_attn_weights", False, True),
        ("add_cross_attention", True, False),
    ],
)
def test_gpt2_variants_with_other_mathematics_are_refused(
    key: str, value: bool, only: bool, tmp_path: Path, gpt2_folder: Path
) -> None:
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", **{key: value})
    refused(tmp_path, f"{key} = {value} is not supported; only {only} is")


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "config.json"), "no such file; a base is a Hugging Face folder")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ("{}", "model_type None")],
)
def test_a_config_that_is_no_object(content: str, fragment: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, str(folder / "config.json"), fragment)


def test_a_config_that_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, str(folder / "config.json"), "not valid JSON")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(kept: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(folder, str(path), "not a whole safetensors file")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(hf_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "no model.safetensors", "pickled checkpoints (.bin) are not read")


def _shard(folder: Path) -> Path:
    hf_model(folder).save_pretrained(str(folder / "sharded"), max_shard_size="100KB")
    return folder / "sharded"


def test_a_missing_shard(folder: Path) -> None:
    sharded = _shard(folder)
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, "model.safetensors.index.json", f"names the shard {shard.name!r}, which is not in the folder")


def test_a_truncated_shard(folder: Path) -> None:
    shard = sorted(_shard(folder).glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(shard.parent, str(shard), "not a whole safetensors file")


def test_a_shard_outside_of_the_folder(folder: Path) -> None:
    sharded = _shard(folder)
    edit_json(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": "../model.safetensors"})
    refused(sharded, "names the shard '../model.safetensors', which is not in the folder")


@pytest.mark.parametrize("weight_map", [..., ["model.safetensors"], {"a": 3}])
def test_a_malformed_index(weight_map: object, folder: Path) -> None:
    sharded = _shard(folder)
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    refused(sharded, str(sharded))


def test_messages_are_for_people(folder: Path) -> None:
    """No Python object representation, no traceback text."""
    edit_json(folder / "config.json", model_type="t5")
    with pytest.raises(CheckpointError) as caught:
        GPT.from_pretrained(folder)
    assert re.fullmatch(r"[^<>]+", str(caught.value))
