"""One line about an adapter: each method with its size and its places."""

from pathlib import Path

import pytest

from quiver_peft import (
    GPT,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
)
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.summary import summary

SUMMARIES: list[tuple[PEFTConfig, str]] = [
    (LoraPEFTConfig(adapter_dim=3), "lora rank 3 on attention.qkv"),
    (LoraPEFTConfig(adapter_dim=3, use_dora=True, target_modules="mlp_fc2"), "dora rank 3 on mlp.down"),
    (LoraPEFTConfig(3, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 7}), "lora rank 3 to 7 on "),
    (IA3PEFTConfig(), "ia3 on attention.qkv, mlp.down"),
    (CanonicalAdaptersPEFTConfig(adapter_dim=4, places=["mlp"]), "canonical width 4 after mlp"),
    (PtuningPEFTConfig(virtual_tokens=5), "ptuning of 5 tokens"),
    (PromptTuningPEFTConfig(virtual_tokens=6), "prompt_tuning of 6 tokens"),
    (PrefixPEFTConfig(virtual_tokens=7), "prefix of 7 tokens"),
]


@pytest.mark.parametrize(("config", "text"), SUMMARIES)
def test_summary_names_method_size_and_places(
    config: PEFTConfig, text: str, llama_folder: Path, tmp_path: Path
) -> None:
    model = GPT.from_pretrained(llama_folder)
    model.add_adapter(config)
    model.save_adapter(tmp_path / "a")
    assert summary(read_adapter(tmp_path / "a", model.base)).startswith(text)
