"""The library as its users write it: add, load, freeze, save, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny import assert_matters, random_tokens

from quiver_peft import GPT, AdapterError, LoraPEFTConfig

TOKENS = random_tokens(1, 20)


def test_without_an_adapter_the_whole_model_is_trainable(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    assert len(list(model.trainable_parameters())) == len(list(model.parameters()))
    model(TOKENS).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_freeze_leaves_nothing_trainable_and_turns_dropout_off(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter([LoraPEFTConfig(adapter_dropout=0.5)])
    model.train()
    model.freeze()
    assert list(model.trainable_parameters()) == []
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_a_config_or_a_list_of_one_is_the_same(llama_folder: Path) -> None:
    counts: list[int] = []
    for configs in (LoraPEFTConfig(), [LoraPEFTConfig()]):
        model = GPT.from_pretrained(llama_folder)
        model.add_adapter(configs)
        counts.append(sum(p.numel() for p in model.trainable_parameters()))
    assert counts[0] == counts[1] > 0


def test_add_adapter_refuses_a_second_one(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig())
    first = model.adapter
    with pytest.raises(AdapterError, match="has an adapter already"):
        model.add_adapter(LoraPEFTConfig())
    assert model.adapter is first


def test_add_adapter_refuses_no_method_or_one_twice(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    with pytest.raises(AdapterError, match="an adapter needs at least one method; leave add_adapter out"):
        model.add_adapter([])
    with pytest.raises(AdapterError, match="an adapter holds each method at most once, not lora, lora"):
        model.add_adapter([LoraPEFTConfig(), LoraPEFTConfig()])
    assert model.adapter is None
    assert all(p.requires_grad for p in model.parameters()), "a refused adapter freezes nothing"


def test_save_adapter_needs_an_adapter(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter to save; call add_adapter or load_adapters first"):
        GPT.from_pretrained(llama_folder).save_adapter(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_writes_the_adapter_alone(llama_folder: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    revision = model.save_adapter(
        tmp_path / "a",
        tokenizer_digest="abc",
        training={"steps": 7},
        extra_files={"curve.png": b"picture"},
    )
    files = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "quiver.json", "curve.png"}
    # Three layers of q, k, v: A once for each, fp32, and a header.
    assert files["adapter_model.safetensors"] < 3 * 2 * (3 * 64 + 128) * 4 + 4096
    record = json.loads((tmp_path / "a" / "quiver.json").read_text())
    assert record["revision"] == revision
    assert record["base_fingerprint"] == model.base.fingerprint
    assert record["tokenizer_digest"] == "abc"
    assert record["training"] == {"steps": 7}
    assert record["schema_version"] == 1
    assert record["methods"][0]["method"] == "lora"


def test_saving_again_replaces_the_whole_folder(llama_folder: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    first = model.save_adapter(tmp_path / "a", extra_files={"old.png": b""})
    with torch.no_grad():
        next(model.trainable_parameters()).add_(1)
    second = model.save_adapter(tmp_path / "a")
    assert first != second
    assert not (tmp_path / "a" / "old.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_loading_freezes_the_base_and_the_adapter_may_be_trained_on(llama_folder: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_adapter(tmp_path / "a")
    again = GPT.from_pretrained(llama_folder)
    bare = again(TOKENS).detach()
    again.load_adapters(tmp_path / "a")
    assert not any(p.requires_grad for p in again.base.parameters())
    assert sum(p.numel() for p in again.trainable_parameters()) == sum(p.numel() for p in model.trainable_parameters())
    assert_matters(again(TOKENS).detach(), bare)


def test_hidden_then_logits_is_forward(llama_folder: Path) -> None:
    model = GPT.from_pretrained(llama_folder)
    assert torch.equal(model.base.logits(model.hidden(TOKENS)), model(TOKENS))
