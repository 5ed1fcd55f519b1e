"""`quiver export`: folders that Hugging Face PEFT loads and that give our logits; refusals with code and message."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, hf_peft, our_logits, random_tokens, tiny_t5

from quiver_peft import (
    GPT,
    T5,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PromptTuningPEFTConfig,
    load_model,
)
from quiver_trainer.cli.export import main

TOKENS = random_tokens(1, 10, seed=1)


def make_adapter(base: Path, folder: Path, *configs: Any) -> GPT | T5:
    model = load_model(base)
    model.add_adapter(configs)
    for parameter in model.trainable_parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    model.save_adapter(folder)
    model.freeze()
    return model


def export(base: Path, adapter: Path, output: Path) -> int:
    return main(["--base", str(base), "--adapter", str(adapter), str(output)])


def test_one_method_becomes_one_folder(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_adapter(base_folder, tmp_path / "a", LoraPEFTConfig(adapter_dim=3, use_dora=True))
    assert export(base_folder, tmp_path / "a", tmp_path / "out" / "b") == 0
    assert f"wrote {tmp_path / 'out' / 'b'}: lora of a" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out" / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_close(hf_logits(hf_peft(base_folder, tmp_path / "out" / "b"), TOKENS), our_logits(model, TOKENS))


def test_several_methods_become_a_folder_each(tmp_path: Path) -> None:
    tiny_t5(tmp_path / "base")
    configs = {
        "lora": LoraPEFTConfig(adapter_dim=3),
        "ia3": IA3PEFTConfig(),
        "prompt_tuning": PromptTuningPEFTConfig(4),
    }
    make_adapter(tmp_path / "base", tmp_path / "a", *configs.values())
    assert export(tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    bare = hf_logits(hf_model(tmp_path / "base"), TOKENS)
    for method in configs:
        theirs = hf_logits(hf_peft(tmp_path / "base", tmp_path / "out" / method), TOKENS)
        assert_matters(theirs, bare)
        alone = load_model(tmp_path / "base")
        alone.load_adapters(tmp_path / "out" / method)
        alone.freeze()
        assert alone.adapter is not None and [type(config) for config in alone.adapter.configs] == [
            type(configs[method])
        ]
        assert_close(our_logits(alone, TOKENS), theirs)


def test_refusals(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(base_folder, tmp_path / "a", LoraPEFTConfig(), CanonicalAdaptersPEFTConfig(adapter_dim=2))
    assert export(base_folder, tmp_path / "a", tmp_path / "out") == 2
    assert "method 'canonical' cannot be exported: Hugging Face PEFT has no form for it" in capsys.readouterr().err
    assert export(base_folder, tmp_path / "a", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert export(tmp_path / "nobase", tmp_path / "a", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    assert main([]) == 2
