"""The seam of a device against the plain one: every method in one batch, through tables that adapters share."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, assert_matters, random_prompts
from torch import Tensor

from quiver_peft import (
    AdapterError,
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    PrefixPEFTConfig,
    PromptTuningPEFTConfig,
    load_model,
)
from quiver_peft.adapters.serving.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.serving.cpp_seam import CppSeam
from quiver_peft.adapters.serving.slot_tables import SlotTables
from quiver_peft.adapters.serving.torch_seam import RowGroup, TorchSeam, VirtualRows
from quiver_peft.adapters.serving.triton_seam import TritonSeam
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.base import Base
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.base.paged_t5 import PackedAttention
from quiver_peft.base.sites import Seam
from quiver_peft.base.t5 import T5Base

METHODS: list[Any] = [
    LoraPEFTConfig(adapter_dim=3, target_modules=["all"]),
    LoraPEFTConfig(adapter_dim=9, target_modules=["all"], variant="canonical"),
    LoraPEFTConfig(adapter_dim=2, use_dora=True, variant="canonical"),
    IA3PEFTConfig(),
    CanonicalAdaptersPEFTConfig(adapter_dim=5),
    CanonicalAdaptersPEFTConfig(adapter_dim=11, norm_position="post", activation="relu"),
    [
        LoraPEFTConfig(adapter_dim=2, target_modules=["all"]),
        IA3PEFTConfig(),
        CanonicalAdaptersPEFTConfig(adapter_dim=4),
    ],
    [PrefixPEFTConfig(virtual_tokens=2), PromptTuningPEFTConfig(virtual_tokens=3), IA3PEFTConfig()],
]
TOLERANCE = 2e-5
LENGTHS = [1, 12, 2, 1, 3, 30, 1, 9, 4]  # of the base's rows first, then of each adapter's; few and many


def make_weights(folder: Path, configs: Any, seed: int) -> AdapterWeights:
    """Every trained number moved from where it starts."""
    torch.manual_seed(seed)
    model = load_model(folder)
    model.add_adapter(configs)
    assert model.adapter is not None
    for parameter in model.trainable_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.adapter.weights(model.base)


class Bench:
    """A base with every adapter in banks with tables and in banks without, on one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.base = load_model(folder).base.to(device)
        self.tables = SlotTables.of(self.base, num_rows=len(METHODS) + 1)
        self.plain, self.fast = (AdapterBanks(2**20, torch.float32, device, tables) for tables in (None, self.tables))
        self.weights = [make_weights(folder, configs, seed) for seed, configs in enumerate(METHODS)]
        self.slots = [BASE_SLOT]
        for weights in self.weights:
            slot = self.plain.insert(weights)
            assert slot is not None and self.fast.insert(weights) == slot
            self.slots.append(slot)
        self.tokens = [ids for prompt in random_prompts(LENGTHS) for ids in prompt]

    def groups(self) -> tuple[list[RowGroup], list[VirtualRows]]:
        """One group for each; the last adapter's begins with virtual tokens."""
        ends = list(itertools.accumulate(LENGTHS))
        groups = [RowGroup(slot, end - n, end) for slot, n, end in zip(self.slots, LENGTHS, ends, strict=True)]
        start = groups[-1].start
        return groups, [VirtualRows(self.slots[-1], start, start + 4, 0)]

    @torch.inference_mode()
    def run(self, seam: Seam) -> Tensor:
        """A packed batch through a GPT, or through a T5's encoder."""
        tokens = torch.tensor(self.tokens, device=self.device)
        if isinstance(self.base, T5Base):
            return self.base.encode(
                tokens, PackedAttention(LENGTHS, self.base.encoder.bias.bias_for_offsets(), self.device), seam
            )
        assert isinstance(self.base, GPTBase)
        kv = PagedKV(self.base.config, 4 * len(LENGTHS), 16, torch.float32, self.device)
        tables = [range(4 * i, 4 * i + 4) for i in range(len(LENGTHS))]
        layout = PagedLayout(LENGTHS, LENGTHS, tables, 16, self.device)
        positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(self.device)
        return self.base(tokens, positions, PagedAttention(kv, layout), seam)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on the GPU instead")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_method_in_one_batch(family: str, model_folders: dict[str, Path], device: torch.device) -> None:
    bench = Bench(model_folders[family], device)
    groups, virtual = bench.groups()
    fast, plain = bench.fast.seam(groups, virtual), bench.plain.seam(groups, virtual)
    assert isinstance(fast, TritonSeam) and isinstance(plain, TorchSeam | CppSeam)
    bare = bench.run(bench.plain.seam([RowGroup(BASE_SLOT, 0, len(bench.tokens))]))
    found, expected = bench.run(fast), bench.run(plain)
    for start, end in ((group.start, group.end) for group in groups[1:]):
        assert_matters(expected[start:end], bare[start:end], TOLERANCE)
    assert_close(found, expected, TOLERANCE)
    assert torch.equal(found[0], bare[0]), "the base's row"


def table_of_ranks(tables: SlotTables) -> list[list[int]]:
    return tables.lora[:, :, 0].tolist()


def test_rows_of_the_tables_are_given_again(llama_folder: Path, device: torch.device) -> None:
    base = load_model(llama_folder).base.to(device)
    tables = SlotTables.of(base, num_rows=3)
    banks = AdapterBanks(2**20, torch.float32, device, tables)
    weights = [make_weights(llama_folder, configs, seed=0) for configs in METHODS[:3]]
    free = banks.free_bytes
    first, second = banks.insert(weights[0]), banks.insert(weights[1])
    assert first is not None and second is not None
    assert all(row[0] == 0 for row in table_of_ranks(tables)), "the base's row stays zero"
    taken = banks.free_bytes
    assert banks.insert(weights[2]) is None, "the tables are full"
    assert banks.free_bytes == taken
    banks.remove(first)
    third = banks.insert(weights[2])
    assert third is not None and third not in (first, second)
    banks.remove(second)
    banks.remove(third)
    assert banks.free_bytes == free


def test_what_the_tables_cannot_hold_takes_no_memory(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Base = load_model(llama_folder).base
    banks = AdapterBanks(2**20, torch.float32, torch.device("cpu"), SlotTables.of(base, num_rows=3))
    free = banks.free_bytes
    weights = make_weights(llama_folder, METHODS[1], seed=0)
    monkeypatch.setattr("quiver_peft.kernels.triton.records.MAX_EXPANDS", 2)
    with pytest.raises(AdapterError, match="3 LoRA targets at one site"):
        banks.insert(weights)
    assert banks.free_bytes == free


def test_without_a_gpu_there_are_no_tables(llama_folder: Path) -> None:
    assert SlotTables.for_triton(load_model(llama_folder).base, num_rows=8) is None
