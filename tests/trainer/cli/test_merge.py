"""`quiver merge`: a folder that transformers loads; refusals with code and message."""

from pathlib import Path

import pytest
import torch
from support.tiny import assert_close, hf_logits, hf_model, random_tokens

from quiver_peft import GPT, CanonicalAdaptersPEFTConfig, IA3PEFTConfig, LoraPEFTConfig
from quiver_trainer.cli.merge import main

TOKENS = random_tokens(1, 10, seed=1)


def make_adapter(
    base: Path, folder: Path, *configs: LoraPEFTConfig | IA3PEFTConfig | CanonicalAdaptersPEFTConfig
) -> GPT:
    model = GPT.from_pretrained(base)
    model.add_adapter(configs)
    for parameter in model.trainable_parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    model.save_adapter(folder)
    return model


def merge(base: Path, adapter: Path, output: Path) -> int:
    return main(["--base", str(base), "--adapter", str(adapter), str(output)])


def test_transformers_loads_the_result(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_adapter(base_folder, tmp_path / "a", LoraPEFTConfig(adapter_dim=3), IA3PEFTConfig())
    assert merge(base_folder, tmp_path / "a", tmp_path / "merged") == 0
    assert "with a (lora, ia3) folded in" in capsys.readouterr().out
    assert_close(hf_logits(hf_model(tmp_path / "merged"), TOKENS), model(TOKENS).detach())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_refusals(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(base_folder, tmp_path / "a", CanonicalAdaptersPEFTConfig(adapter_dim=2))
    assert merge(base_folder, tmp_path / "a", tmp_path / "merged") == 2
    assert "method 'canonical' cannot be merged" in capsys.readouterr().err
    assert merge(base_folder, tmp_path / "a", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert merge(base_folder, tmp_path / "none", tmp_path / "merged") == 2
    assert "adapter_config.json: no such file" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main([]) == 2
