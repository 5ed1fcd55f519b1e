"""Rotary embeddings of every supported kind, in both styles of config.json, against transformers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import MAX_POSITIONS, assert_close, assert_matters, edit_json, hf_logits, hf_model, random_tokens

from quiver_peft import GPT, CheckpointError
from quiver_peft.base.config import read_rope

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "default, small theta": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3, other bands": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 16.0, "factor": 32.0},
    "yarn": YARN,
    "yarn, long": {**YARN, "factor": 16.0, "original_max_position_embeddings": 16},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.7},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, mscale alone": {**YARN, "mscale": 2.0},
    "yarn, betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, not truncated": {**YARN, "truncate": False},
}
TOKENS = random_tokens(2, 120)


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path) -> Path:
    """The tiny Llama with a config.json that may be edited."""
    (tmp_path / "model.safetensors").symlink_to(llama_folder / "model.safetensors")
    shutil.copy(llama_folder / "config.json", tmp_path)
    return tmp_path


def _logits(folder: Path) -> torch.Tensor:
    return GPT.from_pretrained(folder)(TOKENS).detach()


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "rope_scaling with type"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, style: str, folder: Path) -> None:
    given = {"rope_theta": 10000.0, **KINDS[kind]}
    plain = hf_logits(hf_model(folder), TOKENS)
    if style == "rope_parameters":
        edit_json(folder / "config.json", rope_parameters=given)
    else:
        theta = given.pop("rope_theta")
        if style == "rope_scaling with type":
            given["type"] = given.pop("rope_type")
        edit_json(folder / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=given)
    expected = hf_logits(hf_model(folder), TOKENS)
    assert_matters(expected, plain)
    assert_close(_logits(folder), expected)


def test_dynamic_is_unscaled_up_to_the_trained_length(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0})
    assert_close(_logits(folder), hf_logits(hf_model(folder), TOKENS))


def test_old_configs_without_any_scaling(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=300.0, rope_scaling=None)
    expected = hf_logits(hf_model(folder), TOKENS)
    assert_close(_logits(folder), expected)
    edit_json(folder / "config.json", rope_theta=...)
    default_theta = hf_logits(hf_model(folder), TOKENS)
    assert_matters(expected, default_theta)
    assert_close(_logits(folder), default_theta)


def test_a_partial_rotary_factor_rotates_fewer_features() -> None:
    rope = read_rope({"max_position_embeddings": 64, "partial_rotary_factor": 0.5}, head_dim=16)
    assert rope.dim == 8


def test_yarn_without_a_factor_stretches_to_the_maximum() -> None:
    given = {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": None}
    rope = read_rope({"max_position_embeddings": MAX_POSITIONS, "rope_parameters": given}, head_dim=16)
    assert rope.factor == 4.0


@pytest.mark.parametrize("kind", ["longrope", "mrope"])
def test_an_unknown_kind_is_refused(kind: str, folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(
        CheckpointError, match=rf"rope_type '{kind}' is not supported; known: default, linear, dynamic, llama3, yarn"
    ):
        GPT.from_pretrained(folder)


def test_a_missing_field_of_a_kind_is_named(folder: Path) -> None:
    incomplete = {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}
    edit_json(folder / "config.json", rope_parameters={**incomplete, "rope_theta": 10000.0})
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        GPT.from_pretrained(folder)
