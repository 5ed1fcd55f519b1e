"""Reading and writing whole base folders: shards, bare models, old buffers, round trips, fingerprints, memory."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny import (
    assert_close,
    assert_matters,
    edit_json,
    edit_tensors,
    hf_logits,
    hf_model,
    random_tokens,
    tiny_gpt2,
    tiny_llama,
)
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from quiver_peft.base.checkpoint import fingerprint, save_checkpoint
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.gpt import GPTBase

TOKENS = random_tokens(2, 40)
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    base = GPTBase.from_pretrained(folder)
    return base.logits(base(TOKENS))


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """A copy of a tiny model that the test may change."""
    return Path(shutil.copytree(model_folders[request.param], tmp_path / "base"))


def test_shards_are_read_as_one(folder: Path, tmp_path: Path) -> None:
    model = hf_model(folder)
    model.save_pretrained(str(tmp_path / "sharded"), max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path / "sharded"), logits(folder))
    assert_close(logits(tmp_path / "sharded"), hf_logits(model, TOKENS))


@pytest.mark.parametrize("family", MAKERS)
def test_checkpoints_of_the_bare_model_lack_the_prefix(family: str, tmp_path: Path) -> None:
    model = MAKERS[family](tmp_path / "whole", tie_word_embeddings=True)
    bare = model.base_model
    assert isinstance(bare, PreTrainedModel)
    bare.save_pretrained(str(tmp_path / "bare"))
    edit_tensors(tmp_path / "bare" / "model.safetensors", _assert_bare)
    assert torch.equal(logits(tmp_path / "bare"), logits(tmp_path / "whole"))
    assert_close(logits(tmp_path / "bare"), hf_logits(model, TOKENS))


def _assert_bare(tensors: dict[str, Tensor]) -> None:
    assert not [name for name in tensors if name.startswith(("model.", "transformer."))]


def test_a_tied_head_that_is_stored_as_well_is_ignored(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, tie_word_embeddings=True)
    expected = hf_logits(model, TOKENS)
    edit_tensors(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    assert_close(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
    ],
)
def test_buffers_of_old_checkpoints_are_ignored(
    family: str, buffers: list[str], tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    shutil.copytree(model_folders[family], tmp_path, dirs_exist_ok=True)
    edit_tensors(
        tmp_path / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(3) for name in buffers})
    )
    assert torch.equal(logits(tmp_path), logits(model_folders[family]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_widened(stored: torch.dtype, folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()})
    )
    base = GPTBase.from_pretrained(folder)
    assert base.embedding.weight.dtype == torch.float32
    assert_close(logits(folder), hf_logits(hf_model(folder), TOKENS))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MAKERS)
def test_a_written_checkpoint_loads_in_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    model = MAKERS[family](tmp_path / "base", tie_word_embeddings=tied)
    base = GPTBase.from_pretrained(tmp_path / "base")
    (tmp_path / "written").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "written")
    save_checkpoint(base, tmp_path / "written", FAMILIES[family].tensor_mappings(base.config), torch.float32)
    assert torch.equal(hf_logits(hf_model(tmp_path / "written"), TOKENS), hf_logits(model, TOKENS))
    assert torch.equal(logits(tmp_path / "written"), logits(tmp_path / "base"))


def test_stop_tokens_come_from_the_generation_config(folder: Path) -> None:
    assert GPTBase.from_pretrained(folder).config.eos_token_ids == (1,)
    edit_json(folder / "generation_config.json", eos_token_id=[5, 7])
    assert GPTBase.from_pretrained(folder).config.eos_token_ids == (5, 7)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    assert GPTBase.from_pretrained(folder).config.eos_token_ids == ()


def test_the_fingerprint_does_not_depend_on_shards_or_on_the_type_it_is_served_in(folder: Path, tmp_path: Path) -> None:
    hf_model(folder).save_pretrained(str(tmp_path / "sharded"), max_shard_size="100KB")
    assert fingerprint(tmp_path / "sharded") == fingerprint(folder)
    assert GPTBase.from_pretrained(folder, dtype=torch.bfloat16).fingerprint == fingerprint(folder)


def _first(tensor: Tensor) -> None:
    tensor.view(-1)[0] += 1e-3


def _last(tensor: Tensor) -> None:
    tensor.view(-1)[-1] += 1e-3


@pytest.mark.parametrize("change", [_first, _last])
def test_one_changed_weight_changes_the_fingerprint(change: Callable[[Tensor], None], folder: Path) -> None:
    before = fingerprint(folder)
    edit_tensors(folder / "model.safetensors", lambda tensors: None)
    assert fingerprint(folder) == before
    edit_tensors(folder / "model.safetensors", lambda tensors: change(sorted(tensors.items())[0][1]))
    assert fingerprint(folder) != before


def test_another_training_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    edit_tensors(folder / "model.safetensors", _swap_two_of_one_shape)
    assert fingerprint(folder) != before


def _swap_two_of_one_shape(tensors: dict[str, Tensor]) -> None:
    prefix = "model.layers.{}.mlp.up_proj.weight" if "model.norm.weight" in tensors else "transformer.h.{}.ln_1.weight"
    first, second = prefix.format(0), prefix.format(1)
    tensors[first], tensors[second] = tensors[second], tensors[first]


_LOAD = """
import sys, threading
import torch
from quiver_peft.base.gpt import GPTBase

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
before = peak = resident()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
base = GPTBase.from_pretrained(sys.argv[1])
done.set()
thread.join()
print(sum(p.numel() * p.element_size() for p in base.parameters()), peak - before, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: reads /proc/self/status")
def test_reading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """Anonymous memory, which is what a copy takes; the mapped file is the kernel's to drop."""
    tiny_llama(tmp_path, hidden_size=1024, intermediate_size=4096, dtype=torch.float32)
    out = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)], capture_output=True, text=True, check=True, env=_environment()
    )
    weights, peak, after = (int(number) for number in out.stdout.split())
    assert weights > 150e6
    assert after > 0.9 * weights, "the measure itself sees the weights"
    assert peak < 1.5 * weights


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""}


def test_the_effect_of_a_weight_is_seen(folder: Path) -> None:
    """The comparisons above can fail: a changed norm moves the logits a thousand tolerances."""
    before = logits(folder)
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: [tensors[n].mul_(1.5) for n in tensors if n.endswith(("model.norm.weight", "ln_f.weight"))],
    )
    assert_matters(logits(folder), before)
