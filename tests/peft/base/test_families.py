"""The relatives of Llama against transformers: whole sequences, chunks and single tokens, beyond their windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    assert_close,
    assert_matters,
    edit_json,
    hf_logits,
    hf_lora,
    hf_model,
    random_tokens,
    save_model,
    special_ids,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quiver_peft import GPT, CheckpointError
from quiver_peft.base.checkpoint import save_checkpoint
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout

TOKENS = random_tokens(2, 60, seed=2)
CHUNKS = (25, 1, 14, 1, 1, 17, 1)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 13}),
    "mistral, own head size": ("mistral", {"sliding_window": 100, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, upper layers with a window": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, biases, window": ("qwen3", {"attention_bias": True, "head_dim": 16, **WINDOWED}),
    "nemotron": ("nemotron", {}),
    "nemotron, biases, a quarter rotated": (
        "nemotron",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
}


def make(folder: Path, name: str) -> Path:
    family, settings = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **special_ids(), **settings})
    save_model(AutoModelForCausalLM.from_config(config), folder, seed=0)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), request.param)


@torch.inference_mode()
def in_chunks(base: GPTBase, tokens: Tensor) -> Tensor:
    """The logits of both rows, a few tokens at a time through the paged cache."""
    kv = PagedKV(base.config, 16, 8, torch.float32, torch.device("cpu"))
    tables = [list(range(0, 16, 2)), list(range(1, 16, 2))]
    found: list[Tensor] = []
    done = 0
    for size in CHUNKS:
        layout = PagedLayout([size, size], [done + size] * 2, tables, 8, torch.device("cpu"))
        rows = tokens[:, done : done + size].flatten()
        positions = torch.arange(done, done + size).repeat(2)
        hidden = base(rows, positions, PagedAttention(kv, layout))
        found.append(base.logits(hidden).view(2, size, -1))
        done += size
    assert done == tokens.shape[1]
    return torch.cat(found, dim=1)


def test_logits_equal_transformers(folder: Path) -> None:
    expected = hf_logits(hf_model(folder), TOKENS)
    model = GPT.from_pretrained(folder)
    assert_close(model(TOKENS).detach(), expected)
    assert_close(in_chunks(model.base, TOKENS), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "window" in name])
def test_the_windows_matter(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name)
    limited = hf_logits(hf_model(folder), TOKENS)
    edit_json(folder / "config.json", sliding_window=None, use_sliding_window=False, layer_types=...)
    assert_matters(hf_logits(hf_model(folder), TOKENS), limited)


def test_a_lora_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    adapted = hf_lora(folder, tmp_path, targets="all-linear")
    model = GPT.from_pretrained(folder)
    model.load_adapters(tmp_path)
    assert_close(model.eval()(TOKENS).detach(), hf_logits(adapted, TOKENS))


def test_what_is_written_is_what_was_read(folder: Path, tmp_path: Path) -> None:
    base = GPTBase.from_pretrained(folder)
    save_checkpoint(base, tmp_path, FAMILIES[base.config.family].tensor_mappings(base.config), torch.float32)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_unknown_layer_types_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2, upper layers with a window")
    edit_json(folder / "config.json", layer_types=["full_attention", "chunked_attention"] * 2)
    with pytest.raises(
        CheckpointError, match=r"layer_types .*chunked_attention.* must name one of full_attention, slid"
    ):
        GPT.from_pretrained(folder)
