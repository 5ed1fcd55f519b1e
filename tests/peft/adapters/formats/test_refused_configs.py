"""Fields of adapter_config.json that would change the result are refused by name; nothing is applied.

Where PEFT can write the field itself, PEFT writes it; the others are edited into a good artefact.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.tiny import edit_json, hf_lora, random_tokens

from quiver_peft import GPT, AdapterError
from quiver_peft.adapters.formats.hf_lora import HARMLESS_FIELDS, USED_FIELDS

TOKENS = random_tokens(1, 20)
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def good(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    hf_lora(llama_folder, folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter that the test may break."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def model(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GPT:
    """A model that answers with another adapter already."""
    other = tmp_path_factory.mktemp("other")
    hf_lora(llama_folder, other, seed=3, targets=["k_proj"])
    model = GPT.from_pretrained(llama_folder)
    model.load_adapters(other)
    model.freeze()
    return model


def refused(model: GPT, folder: Path, *fragments: str) -> None:
    before = model(TOKENS)
    with pytest.raises(AdapterError) as caught:
        model.load_adapters(folder)
    for fragment in (str(folder), CONFIG, *fragments):
        assert fragment in str(caught.value)
    assert torch.equal(model(TOKENS), before)


FIELDS: list[tuple[str, object]] = [
    ("modules_to_save", ["lm_head"]),
    ("lora_bias", True),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("trainable_token_indices", [1, 2]),
    ("alora_invocation_tokens", [5, 6]),
    ("loftq_config", {"loftq_bits": 4}),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("megatron_config", {"hidden_size": 64}),
    ("corda_config", {"corda_method": "kpm"}),
    ("arrow_config", {"top_k": 2}),
    ("kasa_config", {"beta": 1}),
    ("use_quantum_lora", True),
    ("some_future_field", {"depth": 3}),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_fields_that_change_the_result_are_refused(field: str, value: object, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, **{field: value})
    refused(model, folder, f"{field} = {value!r} is not supported (it would change the result)")


@pytest.mark.parametrize("value", [None, False, [], {}, "", 0])
def test_an_unknown_field_that_is_empty_is_harmless(value: object, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, some_future_field=value)
    GPT(model.base).load_adapters(folder)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(bias: Any, model: GPT, llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path, bias=bias)
    refused(model, tmp_path, f"bias = {bias!r} is not supported; only 'none' is")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "newer"])
def test_starts_that_change_the_base_are_refused(init: str, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, init_lora_weights=init)
    refused(model, folder, f"init_lora_weights = {init!r} changes the base's own weights")


def test_dora_without_its_magnitudes(model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, use_dora=True)
    refused(model, folder, "lora_magnitude_vector of 'model.layers.0.self_attn.q_proj' is missing; use_dora is set")


def test_a_saved_head_as_peft_saves_it(model: GPT, llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path, modules_to_save=["lm_head"])
    refused(model, tmp_path, "modules_to_save = ['lm_head'] is not supported")


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_an_adapted_embedding_as_peft_saves_it(model: GPT, llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path, targets=["q_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match=r"embed_tokens.*nothing may be left unapplied"):
        model.load_adapters(tmp_path)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_an_adapted_head_as_peft_saves_it(model: GPT, llama_folder: Path, tmp_path: Path) -> None:
    hf_lora(llama_folder, tmp_path, targets=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head.*nothing may be left unapplied"):
        model.load_adapters(tmp_path)


@pytest.mark.parametrize("peft_type", ["LOHA", "NEWER", None, 5, ["LORA"]])
def test_other_methods_are_refused(peft_type: object, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, peft_type=peft_type)
    refused(model, folder, f"peft_type {peft_type!r} is not supported; known: LORA")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION", 3, ["CAUSAL_LM"]])
def test_other_tasks_are_refused(task_type: object, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, task_type=task_type)
    refused(model, folder, f"task_type = {task_type!r} is not supported; use CAUSAL_LM")


def test_a_task_of_another_kind_of_base_is_refused(model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, task_type="SEQ_2_SEQ_LM")
    refused(model, folder, "task_type = 'SEQ_2_SEQ_LM' is made for an encoder-decoder; this base is a decoder-only")


MALFORMED: list[tuple[str, object, str]] = [
    ("r", ..., "r must be a positive"),
    ("r", 0, "r must be a positive"),
    ("r", "8", "r must be a positive"),
    ("r", True, "r must be a positive"),
    ("r", 4.5, "r must be a positive whole number, not 4.5"),
    ("lora_alpha", -1, "lora_alpha must be a positive number, not -1"),
    ("lora_alpha", None, "lora_alpha must be a positive number, not None"),
    ("lora_alpha", float("nan"), "lora_alpha must be a positive number, not nan"),
    ("target_modules", ..., "target_modules None match no linear of this base (llama: down_proj"),
    ("target_modules", ["w_pack"], "target_modules ['w_pack'] match no linear of this base (llama: down_proj"),
    ("target_modules", "(", "malformed"),
    ("target_modules", 5, "malformed"),
    ("target_modules", [5], "malformed"),
    ("exclude_modules", "(", "malformed"),
    ("layers_to_transform", "1", "malformed"),
    ("rank_pattern", ["q_proj"], "rank_pattern must map module names to positive numbers, not ['q_proj']"),
    ("rank_pattern", {"(": 2}, "rank_pattern: '(' is not a regular expression"),
    ("rank_pattern", {"q_proj": "2"}, "rank_pattern must map module names to positive numbers"),
    ("rank_pattern", {"q_proj": None}, "rank_pattern must map module names to positive numbers"),
    ("rank_pattern", {"q_proj": 0}, "rank_pattern must map module names to positive numbers"),
    ("rank_pattern", {"q_proj": 2}, "do not fit rank 2 of adapter_config.json"),
    ("alpha_pattern", {"q_proj": "much"}, "alpha_pattern must map module names to positive numbers"),
    ("alpha_pattern", {"q_proj": float("inf")}, "alpha_pattern must map module names to positive numbers"),
    ("lora_alpha", 10**400, "lora_alpha must be a positive number"),
    ("lora_dropout", "half", "lora_dropout must be a number in [0, 1), not 'half'"),
    ("lora_dropout", 10**400, "lora_dropout must be a number in [0, 1), not 1000"),
    ("lora_dropout", 1.5, "lora_dropout must be a number in [0, 1), not 1.5"),
    ("use_rslora", "no", "use_rslora must be true or false, not 'no'"),
]


@pytest.mark.parametrize(("field", "value", "fragment"), MALFORMED)
def test_malformed_values_are_refused(field: str, value: object, fragment: str, model: GPT, folder: Path) -> None:
    edit_json(folder / CONFIG, **{field: value})
    before = model(TOKENS)
    with pytest.raises(AdapterError) as caught:
        model.load_adapters(folder)
    assert str(folder) in str(caught.value)
    assert fragment in str(caught.value)
    assert torch.equal(model(TOKENS), before)


def test_every_field_that_peft_knows_is_decided_about() -> None:
    """A newer PEFT with another field: decide whether it changes the result. Until then any value of it is refused."""
    refused_fields = {field for field, _ in FIELDS} | {"monteclora_config", "velora_config"}
    ours = USED_FIELDS | HARMLESS_FIELDS | refused_fields
    assert set(LoraConfig().to_dict()) - ours == set()
