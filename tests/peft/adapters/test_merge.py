"""Merging: the base with an adapter folded in answers as the two together, and as Hugging Face's merge does."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from support.tiny import (
    assert_close,
    assert_matters,
    hf_logits,
    hf_lora,
    hf_model,
    our_logits,
    random_tokens,
    their_deprecations,
)

from quiver_peft import (
    AdapterError,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    load_model,
)
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.merge import merge_into

TOKENS = random_tokens(2, 12, seed=6)
MERGEABLE: dict[str, Any] = {
    "lora": LoraPEFTConfig(adapter_dim=3, alpha=5, target_modules=["all"]),
    "dora": LoraPEFTConfig(adapter_dim=3, target_modules=["all"], variant="canonical", use_dora=True),
    "ia3": IA3PEFTConfig(),
    "dora + ia3": [LoraPEFTConfig(adapter_dim=2, target_modules=["all"], use_dora=True), IA3PEFTConfig()],
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "flan"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_apart(name: str, family: str, model_folders: dict[str, Path]) -> None:
    model = load_model(model_folders[family])
    bare = our_logits(model, TOKENS).detach()
    model.add_adapter(MERGEABLE[name])
    generator = torch.Generator().manual_seed(7)
    for parameter in model.trainable_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    assert model.adapter is not None
    apart = our_logits(model, TOKENS).detach()
    assert_matters(apart, bare)
    merge_into(model.base, model.adapter.weights(model.base))
    model.adapter = None
    assert_close(our_logits(model, TOKENS).detach(), apart)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("t5", "all-linear"),
        ("flan", "all-linear"),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_as_hugging_face_merges(
    family: str, targets: Any, use_dora: bool, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs = hf_lora(model_folders[family], tmp_path, targets=targets, use_dora=use_dora)
    with warnings.catch_warnings():
        # It takes a head that was never tied for one that the merge untied.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        merged: Any = theirs.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model = load_model(model_folders[family])
    merge_into(model.base, read_adapter(tmp_path, model.base))
    assert_close(our_logits(model, TOKENS).detach(), hf_logits(merged, TOKENS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "flan"])
def test_as_hugging_face_merges_ia3(family: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of PEFT's own default modules, GPT-2's whole c_attn among them."""
    base = hf_model(model_folders[family])
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    with their_deprecations():
        theirs: Any = get_peft_model(base, IA3Config(task_type=task, fan_in_fan_out=family == "gpt2"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path))
    model = load_model(model_folders[family])
    merge_into(model.base, read_adapter(tmp_path, model.base))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        merged = theirs.merge_and_unload()
    assert_matters(hf_logits(merged, TOKENS), hf_logits(hf_model(model_folders[family]), TOKENS))
    assert_close(our_logits(model, TOKENS).detach(), hf_logits(merged, TOKENS))


@pytest.mark.parametrize(
    ("configs", "method"),
    [
        (CanonicalAdaptersPEFTConfig(), "canonical"),
        (PrefixPEFTConfig(), "prefix"),
        ([LoraPEFTConfig(), PromptTuningPEFTConfig()], "prompt_tuning"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(configs: Any, method: str, llama_folder: Path) -> None:
    model = load_model(llama_folder)
    model.add_adapter(configs)
    before = [parameter.detach().clone() for parameter in model.base.parameters()]
    assert model.adapter is not None
    with pytest.raises(AdapterError, match=f"method '{method}' cannot be merged: it is no change of weights"):
        merge_into(model.base, model.adapter.weights(model.base))
    assert all(torch.equal(old, new) for old, new in zip(before, model.base.parameters(), strict=True))
