"""A packed base: the same answers, the same bits for a row in any batch, and what reads weights still can."""

from pathlib import Path

import pytest
import torch
from support.tiny import assert_close, hf_lora, random_prompts, tiny_llama
from torch import Tensor

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.paged import PagedAttention, PagedKV
from quiver_peft.kernels.cpp.library import library
from quiver_peft.kernels.paged_layout import PagedLayout

CPU = torch.device("cpu")
LENGTHS = [7, 3, 40, 1, 20, 12]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if library() is None:
        pytest.skip("needs the compiled kernels: an x86-64 processor with AVX2, g++, and QUIVER_KERNELS unset")


@torch.inference_mode()
def run(base: GPTBase, banks: AdapterBanks, slots: list[int], prompts: list[list[int]]) -> list[Tensor]:
    """Logits of a packed batch of whole prompts, each under its slot."""
    lengths = [len(ids) for ids in prompts]
    kv = PagedKV(base.config, 4 * len(prompts), 16, torch.float32, CPU)
    layout = PagedLayout(lengths, lengths, [list(range(4 * i, 4 * i + 4)) for i in range(len(prompts))], 16, CPU)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [RowGroup(slot, end - length, end) for slot, length, end in zip(slots, lengths, ends, strict=True)]
    tokens = torch.tensor([token for ids in prompts for token in ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = base(tokens, positions, PagedAttention(kv, layout), banks.seam(rows))
    return list(base.logits(hidden).split(lengths))


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(tied: bool, tmp_path: Path) -> None:
    """Through the whole model, base rows and adapters of several ranks mixed: alone, together, in another order."""
    tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    for rank in (1, 4, 9):
        hf_lora(tmp_path / "base", tmp_path / str(rank), rank=rank, targets="all-linear", seed=rank)
    base = GPTBase.from_pretrained(tmp_path / "base")
    banks = AdapterBanks(1 << 20, torch.float32, CPU)
    slots = [0, *(banks.insert(read_adapter(tmp_path / str(rank), base)) or 0 for rank in (1, 4, 9)), 0, 0]
    slots[4:] = slots[1:3]
    prompts = random_prompts(LENGTHS)
    plain = run(base, banks, slots, prompts)
    count = base.num_parameters
    pack(base)
    assert base.num_parameters == count
    assert all(linear.packed is not None and linear.weight.numel() == 0 for linear in base.linears())
    together = run(base, banks, slots, prompts)
    for found, expected in zip(together, plain, strict=True):
        assert_close(found, expected)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0], [3], [1, 5, 2]):
        found = run(base, banks, [slots[i] for i in order], [prompts[i] for i in order])
        for i, logits in zip(order, found, strict=True):
            assert torch.equal(logits, together[i])


def test_t5_and_gpt2_pack_too(model_folders: dict[str, Path]) -> None:
    for folder in model_folders.values():
        base, packed = load_base(folder), load_base(folder)
        pack(packed)
        for ours, theirs in zip(packed.linears(), base.linears(), strict=True):
            assert ours.packed is not None
            assert torch.equal(ours.plain_weight(), theirs.weight)
        hidden = torch.randn(3, base.config.hidden_size)
        with torch.inference_mode():
            torch.testing.assert_close(packed.project(hidden), base.project(hidden), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_reads_the_base_s_weights(tmp_path: Path) -> None:
    """DoRA's gates are made of the base's rows."""
    tiny_llama(tmp_path / "base")
    hf_lora(tmp_path / "base", tmp_path / "dora", rank=3, targets="all-linear", use_dora=True)
    base, packed = (GPTBase.from_pretrained(tmp_path / "base") for _ in range(2))
    pack(packed)
    expected, found = (read_adapter(tmp_path / "dora", item).scales for item in (base, packed))
    assert expected.keys() == found.keys()
    for site, scale in expected.items():
        for ours, theirs in zip(found[site].out, scale.out, strict=True):
            assert torch.equal(ours.scale, theirs.scale)


def test_other_types_are_left_as_they_are(llama_folder: Path) -> None:
    base = GPTBase.from_pretrained(llama_folder, dtype=torch.bfloat16)
    pack(base)
    assert all(linear.packed is None for linear in base.linears())
