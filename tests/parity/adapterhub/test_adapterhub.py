"""AdapterHub's bottleneck adapters give AdapterHub's logits, alone and saved again in our form; others are refused."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_close, assert_matters, edit_json, edit_tensors, random_tokens
from torch import Tensor

from quiver_peft import GPT, T5, AdapterError, BaseMismatchError, load_model
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.serving.banks import FIRST_SLOT, AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.base.attention import CausalAttention
from quiver_peft.base.gpt import GPTBase

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("gpt2", "llama", "t5")
CASES = [
    (family, name)
    for family in FAMILIES
    for name in ("double_seq_bn", "seq_bn", "par_bn", "gelu_scaled", "gelu_new_attention", "one_layer_out", "cross")
    if (GOLDENS / family / name).is_dir() and (family, name) != ("t5", "one_layer_out")
]


def logits(model: GPT | T5, tokens: Tensor) -> Tensor:
    return (model(tokens, tokens.flip(1)) if isinstance(model, T5) else model(tokens)).detach()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_equal_adapterhub(family: str, name: str, tmp_path: Path) -> None:
    expected = load_file(GOLDENS / family / "logits.safetensors")
    model = load_model(GOLDENS / family / "base")
    assert_close(logits(model, expected["tokens"]), expected["base"])
    assert_matters(expected[name], expected["base"])
    model.load_adapters(GOLDENS / family / name)
    model.freeze()
    assert_close(logits(model, expected["tokens"]), expected[name])
    model.save_adapter(tmp_path / "ours")
    again = load_model(GOLDENS / family / "base")
    again.load_adapters(tmp_path / "ours")
    again.freeze()
    assert_close(logits(again, expected["tokens"]), expected[name])


@pytest.mark.parametrize("name", ["double_seq_bn", "seq_bn", "par_bn"])
@torch.inference_mode()
def test_the_banks_compute_the_same(name: str) -> None:
    expected = load_file(GOLDENS / "gpt2" / "logits.safetensors")
    base = GPTBase.from_pretrained(GOLDENS / "gpt2" / "base")
    banks = AdapterBanks.for_one(read_adapter(GOLDENS / "gpt2" / name, base), torch.float32, torch.device("cpu"))
    tokens = expected["tokens"][:1]
    attend = CausalAttention()
    seam = banks.seam([RowGroup(FIRST_SLOT, 0, tokens.shape[1])])

    def packed(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(layer, q[None], k[None], v[None])[0]

    hidden = base(tokens[0], torch.arange(tokens.shape[1]), packed, seam)
    assert_close(base.logits(hidden), expected[name][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_is_read_only_when_it_is_named(family: str) -> None:
    expected = load_file(GOLDENS / family / "logits.safetensors")
    model = load_model(GOLDENS / family / "base")
    with pytest.raises(AdapterError, match=r"only as the pickle pytorch_adapter\.bin, which is not read unless"):
        model.load_adapters(GOLDENS / family / "pickled")
    assert model.adapter is None
    model.load_adapters(GOLDENS / family / "pickled" / "pytorch_adapter.bin")
    model.freeze()
    assert_close(logits(model, expected["tokens"]), expected["seq_bn"])


class _Code:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDENS / "gpt2" / "pickled" / "adapter_config.json", tmp_path)
    for content in (pickle.dumps(_Code()), pickle.dumps({"a": 1}), b"", b"no pickle"):
        (tmp_path / "pytorch_adapter.bin").write_bytes(content)
        with pytest.raises(AdapterError, match=r"\.bin: (not a pickle of tensors alone|must hold tensors)"):
            load_model(GOLDENS / "gpt2" / "base").load_adapters(tmp_path / "pytorch_adapter.bin")
    assert "this ran" not in capsys.readouterr().out


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ln_before": True}, "ln_before = True is not supported; only False is"),
    ({"original_ln_after": False}, "original_ln_after = False is not supported; only True is"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add' is not supported"),
    ({"phm_layer": True}, "phm_layer = True is not supported"),
    ({"use_gating": True}, "use_gating = True is not supported"),
    ({"inv_adapter": "nice"}, "inv_adapter = 'nice' is not supported"),
    ({"reduction_factor": {"0": 4, "default": 8}}, "reduction_factor must be one number above zero, not {'0': 4"),
    ({"scaling": "learned"}, "scaling must be a number, not 'learned'"),
    ({"non_linearity": "leakyrelu"}, "non_linearity 'leakyrelu' is not supported; known: relu, swish"),
    ({"is_parallel": True, "original_ln_before": True}, "is_parallel with original_ln_before is not supported"),
    ({"leave_out": "0"}, "leave_out must be a list of whole numbers, not '0'"),
    ({"something_new": 3}, r"something_new = 3 is not supported \(it would change the result\)"),
    ({"reduction_factor": 16}, r"has shape \[.*8.*\], not \[.*2\]"),
    ({"mh_adapter": False}, r"tensor 'layers\..\.attention.* has no place by adapter_config.json on this base"),
    ({"output_adapter": False, "mh_adapter": False}, "places must be among attention, mlp, cross_attention, not"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(GOLDENS / "gpt2" / "double_seq_bn", tmp_path / "a"))


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_change_the_result_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / "adapter_config.json"
    edit_json(path, config={**json.loads(path.read_text())["config"], **changes})
    with pytest.raises(AdapterError, match=message):
        load_model(GOLDENS / "gpt2" / "base").load_adapters(folder)


def test_layers_of_one_stack_cannot_be_left_out() -> None:
    with pytest.raises(AdapterError, match="leave_out is not supported on an encoder-decoder"):
        load_model(GOLDENS / "t5" / "base").load_adapters(GOLDENS / "t5" / "one_layer_out")


def test_another_bases_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterError, match="is no bottleneck of this base; nothing may be left unapplied"):
        load_model(GOLDENS / "llama" / "base").load_adapters(folder)
    edit_json(folder / "adapter_config.json", hidden_size=48)
    with pytest.raises(BaseMismatchError, match="hidden_size 48 is another base's; this one has 32"):
        load_model(GOLDENS / "gpt2" / "base").load_adapters(folder)


def test_tensors_missing_or_left_over_are_refused(folder: Path) -> None:
    weights = folder / "adapter.safetensors"
    down = "transformer.h.1.output_adapters.adapters.double_seq_bn.adapter_down.0.weight"
    edit_tensors(weights, lambda tensors: tensors.update({"transformer.h.9.x": tensors[down].clone()}))
    with pytest.raises(AdapterError, match=r"tensor 'transformer.h.9.x' is no bottleneck of this base"):
        load_model(GOLDENS / "gpt2" / "base").load_adapters(folder)
    edit_tensors(weights, lambda tensors: (tensors.pop(down), tensors.pop("transformer.h.9.x")))
    with pytest.raises(AdapterError, match=r"tensor 'layers.1.mlp.down.weight' is missing"):
        load_model(GOLDENS / "gpt2" / "base").load_adapters(folder)


def test_a_trained_one_goes_on_learning() -> None:
    model = load_model(GOLDENS / "gpt2" / "base")
    model.load_adapters(GOLDENS / "gpt2" / "seq_bn")
    assert isinstance(model, GPT)
    model(random_tokens(1, 8) % 96).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
