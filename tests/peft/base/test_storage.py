"""Weights that stay in the checkpoint's 16-bit type: the bits of the same run with fp32 weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import hf_lora, random_tokens, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.base.base import Base
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.t5 import T5Base
from quiver_peft.base.t5_attention import BiasedAttention, WholeSources
from quiver_peft.kernels.cpp.library import library

NARROW = [torch.bfloat16, torch.float16]
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}


def narrow(folder: Path, dtype: torch.dtype, only: str = "") -> None:
    """Store a checkpoint in 16 bits, or those of its tensors whose names hold `only`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.to(dtype) if only in name else t for name, t in tensors.items()}, path, {"format": "pt"})


def load(folder: Path, *, keep: bool, packed: bool) -> Base:
    base = load_base(folder, keep_storage=keep)
    if packed:
        pack(base)
    return base


@torch.inference_mode()
def logits(base: Base, tokens: Tensor) -> Tensor:
    """tokens: [B, S] -> [B, S, V]; of an encoder-decoder its source and what it answers."""
    if not isinstance(base, T5Base):
        return base.logits(base(tokens))
    lengths = torch.full((len(tokens),), tokens.shape[1])
    sources = WholeSources(lengths)
    base.precompute_cross_kv(base.encode(tokens, BiasedAttention(base.encoder.bias, lengths)), sources)
    return base.logits(base(tokens[:, :5], BiasedAttention(base.decoder.bias), sources))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("family", MAKERS)
def test_logits_are_those_of_fp32_weights_bit_for_bit(
    family: str, dtype: torch.dtype, packed: bool, tmp_path: Path
) -> None:
    MAKERS[family](tmp_path)
    narrow(tmp_path, dtype)
    tokens = random_tokens(3, 20)
    kept, widened = (load(tmp_path, keep=keep, packed=packed) for keep in (True, False))
    assert torch.equal(logits(kept, tokens), logits(widened, tokens))
    assert kept.num_parameters == widened.num_parameters
    assert kept.compute_dtype == torch.float32
    assert kept.fingerprint == widened.fingerprint


@pytest.mark.parametrize("tied", [True, False])
def test_half_the_bytes_are_held_and_a_tied_head_once(tied: bool, tmp_path: Path) -> None:
    if library() is None:
        pytest.skip("needs the compiled kernels: an x86-64 processor with AVX2, g++, and QUIVER_KERNELS unset")
    tiny_llama(tmp_path, tie_word_embeddings=tied)
    narrow(tmp_path, torch.bfloat16)
    num_bytes: list[int] = []
    for keep in (True, False):
        base = load(tmp_path, keep=keep, packed=True)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in base.buffers_read() if tensor.dim() > 1}
        num_bytes.append(sum(held.values()))
    matrices = [t.numel() for t in load_file(tmp_path / "model.safetensors").values() if t.dim() > 1]
    # Panels are filled up to whole ones of 16 rows, which the tiny base's shapes are already.
    assert num_bytes == [2 * sum(matrices), 4 * sum(matrices)]


def test_each_weight_keeps_its_own_type_and_parts_of_two_types_are_fp32(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    narrow(tmp_path, torch.bfloat16, only="mlp")
    narrow(tmp_path, torch.float16, only="q_proj")
    kept = load(tmp_path, keep=True, packed=False)
    types = {linear.site.name.split(".", 2)[2]: linear.weight.dtype for linear in kept.linears()}
    assert types["mlp.up"] == types["mlp.down"] == torch.bfloat16
    assert types["attention.qkv"] == types["attention.out"] == torch.float32
    assert kept.embedding.weight.dtype == torch.float32
    tokens = random_tokens(2, 9)
    for packed in (False, True):
        found, expected = (logits(load(tmp_path, keep=keep, packed=packed), tokens) for keep in (True, False))
        assert torch.equal(found, expected)


def test_adapters_in_one_batch_on_narrow_weights(tmp_path: Path) -> None:
    """Adapters themselves are fp32: rows of the base, and of two ranks, have the bits they have on fp32 weights."""
    tiny_llama(tmp_path / "base")
    narrow(tmp_path / "base", torch.bfloat16)
    for rank in (2, 5):
        hf_lora(tmp_path / "base", tmp_path / str(rank), rank=rank, targets="all-linear", seed=rank)
    tokens = random_tokens(3, 12)
    found: list[Tensor] = []
    for keep in (True, False):
        base = load(tmp_path / "base", keep=keep, packed=True)
        banks = AdapterBanks(1 << 20, torch.float32, torch.device("cpu"))
        slots = [0, *(banks.insert(read_adapter(tmp_path / str(rank), base)) or 0 for rank in (2, 5))]
        seam = banks.seam([RowGroup(slot, i, i + 1) for i, slot in enumerate(slots)])
        with torch.inference_mode():
            rows = tokens[:, :1].flatten()
            found.append(base.logits(base(rows, torch.zeros(3, dtype=torch.int64), _itself, seam)))
    assert torch.equal(*found)
    assert not torch.equal(found[0][1], found[0][2])


def _itself(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of single tokens: each sees itself."""
    return v.repeat_interleave(q.shape[-2] // v.shape[-2], -2)
