"""The banks: many adapters in one packed batch give each row what its own adapter alone would, and memory adds up."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.tiny import assert_close, assert_matters, hf_logits, hf_lora, hf_model, random_prompts
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from quiver_peft import GPT
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.methods.lora import LoraWeights
from quiver_peft.adapters.serving.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.serving.torch_seam import RowGroup
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.base.sites import NO_ADAPTERS, Seam

CPU = torch.device("cpu")
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rank": 4},
        {"rank": 1, "targets": "all-linear", "alpha": 2},
        {"rank": 9, "targets": ["k_proj", "gate_proj", "down_proj"], "use_rslora": True},
        {"rank": 6, "targets": ["o_proj", "up_proj"], "alpha": 3, "rank_pattern": {"o_proj": 2}},
    ],
    "gpt2": [
        {"rank": 4, "targets": ["c_attn"]},
        {"rank": 1, "targets": "all-linear"},
        {"rank": 9, "targets": ["attn.c_proj"], "use_rslora": True},
        {"rank": 6, "targets": ["c_fc", "mlp.c_proj"], "alpha": 3},
    ],
}


class Bench:
    """A base, adapters by Hugging Face PEFT on it, and PEFT's own logits of a prompt under each (0: the base)."""

    def __init__(self, family: str, folder: Path, out: Path) -> None:
        self.base = GPTBase.from_pretrained(folder)
        self.prompts = random_prompts([7, 3, 12, 1, 20])
        models: list[PreTrainedModel | PeftModel] = [hf_model(folder)]
        for index, arguments in enumerate(ADAPTERS[family]):
            models.append(hf_lora(folder, out / str(index), seed=index, **arguments))
        self.weights = [read_adapter(out / str(index), self.base) for index in range(len(models) - 1)]
        self.expected = [[hf_logits(m, torch.tensor([ids]))[0] for ids in self.prompts] for m in models]

    def banks(self, capacity_bytes: int = 1 << 20) -> AdapterBanks:
        return AdapterBanks(capacity_bytes, torch.float32, CPU)

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], seam: Seam) -> list[Tensor]:
        """Logits of a packed batch of whole prompts."""
        lengths = [len(ids) for ids in prompts]
        kv = PagedKV(self.base.config, 2 * len(prompts), 16, torch.float32, CPU)
        layout = PagedLayout(lengths, lengths, [[2 * i, 2 * i + 1] for i in range(len(prompts))], 16, CPU)
        tokens = torch.tensor([token for ids in prompts for token in ids])
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = self.base(tokens, positions, PagedAttention(kv, layout), seam)
        return list(self.base.logits(hidden).split(lengths))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bench(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    return Bench(request.param, model_folders[request.param], tmp_path_factory.mktemp("adapters"))


def insert(banks: AdapterBanks, weights: AdapterWeights) -> int:
    slot = banks.insert(weights)
    assert slot is not None
    return slot


def groups(slots: Sequence[int], lengths: Sequence[int]) -> list[RowGroup]:
    """One group for each prompt, the prompts being packed in this order."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [RowGroup(slot, end - length, end) for slot, length, end in zip(slots, lengths, ends, strict=True)]


def test_each_adapter_alone_equals_hugging_face(bench: Bench) -> None:
    banks = bench.banks()
    lengths = [len(ids) for ids in bench.prompts]
    for index, weights in enumerate(bench.weights):
        slot = insert(banks, weights)
        found = bench.run(bench.prompts, banks.seam([RowGroup(slot, 0, sum(lengths))]))
        for logits, expected, bare in zip(found, bench.expected[index + 1], bench.expected[0], strict=True):
            assert_matters(expected, bare)
            assert_close(logits, expected)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 0, 3, 1, 2], [2, 2, 0, 0, 1], [0, 0, 3, 3, 3]])
def test_a_mixed_batch_equals_one_at_a_time(order: list[int], bench: Bench) -> None:
    """order: which adapter each prompt uses, 0 being the base. Every row against PEFT's own, alone and unpadded."""
    banks = bench.banks()
    slots = [BASE_SLOT, *(insert(banks, weights) for weights in bench.weights)]
    lengths = [len(ids) for ids in bench.prompts]
    found = bench.run(bench.prompts, banks.seam(groups([slots[i] for i in order], lengths)))
    for prompt, (adapter, logits) in enumerate(zip(order, found, strict=True)):
        assert_close(logits, bench.expected[adapter][prompt])
        alone = bench.run([bench.prompts[prompt]], banks.seam([RowGroup(slots[adapter], 0, lengths[prompt])]))
        assert_close(logits, alone[0], tolerance=1e-5)


def test_the_banks_equal_the_trainable_form(bench: Bench) -> None:
    """The seam's two sides: one adapter's modules, as in training, and the banks, as in serving."""
    banks = bench.banks()
    model = GPT(bench.base)
    total = sum(len(ids) for ids in bench.prompts)
    for weights in bench.weights:
        model.adapter = TrainableAdapter.from_weights(bench.base, weights).eval()
        served = bench.run(bench.prompts, banks.seam([RowGroup(insert(banks, weights), 0, total)]))
        for ids, logits in zip(bench.prompts, served, strict=True):
            assert_close(logits, model(torch.tensor([ids])).detach()[0])


def test_base_rows_are_bit_identical_to_a_batch_without_adapters(bench: Bench) -> None:
    banks = bench.banks()
    slot = insert(banks, bench.weights[1])
    lengths = [len(ids) for ids in bench.prompts]
    bare = bench.run(bench.prompts, NO_ADAPTERS)
    mixed = bench.run(bench.prompts, banks.seam(groups([0, slot, 0, slot, 0], lengths)))
    assert_matters(mixed[1], bare[1])
    for prompt in (0, 2, 4):
        assert torch.equal(mixed[prompt], bare[prompt])


def test_when_nobody_uses_an_adapter_the_seam_is_the_identity(bench: Bench) -> None:
    banks = bench.banks()
    slot = insert(banks, bench.weights[0])
    assert banks.seam([]) is NO_ADAPTERS
    assert banks.seam([RowGroup(BASE_SLOT, 0, 9)]) is NO_ADAPTERS
    assert banks.seam([RowGroup(BASE_SLOT, 0, 9), RowGroup(slot, 9, 10)]) is not NO_ADAPTERS


def test_removing_an_adapter_returns_the_base_bit_for_bit_and_its_bytes(bench: Bench) -> None:
    banks, bare = bench.banks(), bench.run(bench.prompts, NO_ADAPTERS)
    free = banks.free_bytes
    slots = [insert(banks, weights) for weights in bench.weights]
    taken = [banks.num_bytes(weights) for weights in bench.weights]
    assert free - banks.free_bytes == sum(taken)
    assert [banks.remove(slot) for slot in slots] == taken
    assert banks.free_bytes == free
    lengths = [len(ids) for ids in bench.prompts]
    again = bench.run(bench.prompts, banks.seam(groups([BASE_SLOT] * 5, lengths)))
    assert all(torch.equal(a, b) for a, b in zip(again, bare, strict=True))


def test_a_removed_slot_cannot_be_used_or_removed_again(bench: Bench) -> None:
    banks = bench.banks()
    slot = insert(banks, bench.weights[0])
    banks.remove(slot)
    with pytest.raises(KeyError):
        banks.seam([RowGroup(slot, 0, 1)])
    with pytest.raises(KeyError):
        banks.remove(slot)


def test_slots_are_never_reused(bench: Bench) -> None:
    """A stale slot must not answer for another adapter."""
    banks = bench.banks()
    first = insert(banks, bench.weights[0])
    banks.remove(first)
    assert insert(banks, bench.weights[1]) != first


def test_insert_until_full_then_make_room(bench: Bench) -> None:
    weights = bench.weights[0]
    size = bench.banks().num_bytes(weights)
    banks = bench.banks(3 * size + size // 2)
    slots = [banks.insert(weights) for _ in range(3)]
    assert None not in slots
    assert banks.insert(weights) is None
    assert banks.insert(weights) is None, "a refusal changes nothing"
    assert banks.free_bytes == size // 2
    assert slots[1] is not None
    assert banks.remove(slots[1]) == size
    assert banks.insert(weights) is not None
    assert banks.insert(weights) is None


def test_others_are_untouched_when_one_takes_the_place_of_another(bench: Bench) -> None:
    banks, weights = bench.banks(), bench.weights
    first, second, third = (insert(banks, w) for w in weights[:3])
    lengths = [len(ids) for ids in bench.prompts]
    mixed = [first, third, first, third, first]
    before = bench.run(bench.prompts, banks.seam(groups(mixed, lengths)))
    banks.remove(second)
    insert(banks, weights[3])
    after = bench.run(bench.prompts, banks.seam(groups(mixed, lengths)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adapters_may_come_and_go_from_several_threads(bench: Bench) -> None:
    banks = bench.banks()
    free, total = banks.free_bytes, sum(len(ids) for ids in bench.prompts)
    kept: dict[int, list[int]] = {index: [] for index in range(len(bench.weights))}
    errors: list[BaseException] = []
    start = threading.Barrier(len(bench.weights))

    def work(index: int) -> None:
        try:
            start.wait()
            for turn in range(30):
                slot = insert(banks, bench.weights[index])
                if turn % 10:
                    banks.remove(slot)
                else:
                    kept[index].append(slot)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    slots = [slot for held in kept.values() for slot in held]
    assert len(set(slots)) == len(slots) == 3 * len(bench.weights)
    taken = sum(3 * banks.num_bytes(weights) for weights in bench.weights)
    assert free - banks.free_bytes == taken
    for index, held in kept.items():
        for slot in held:
            found = bench.run(bench.prompts, banks.seam([RowGroup(slot, 0, total)]))
            assert_close(found[0], bench.expected[index + 1][0])


def test_a_half_precision_bank(bench: Bench) -> None:
    banks = AdapterBanks(1 << 20, torch.bfloat16, CPU)
    assert banks.num_bytes(bench.weights[0]) * 2 == bench.banks().num_bytes(bench.weights[0])
    assert insert(banks, bench.weights[0]) == 1
    assert (1 << 20) - banks.free_bytes == banks.num_bytes(bench.weights[0])


def test_num_bytes_is_what_an_insertion_takes_whatever_the_sizes(bench: Bench) -> None:
    """Extents are rounded up; whoever makes room by `num_bytes` must make enough."""
    banks = bench.banks()
    target = bench.weights[0].lora[0]
    odd = AdapterWeights("r", bench.weights[0].configs, (_cut(target, 5),))
    before = banks.free_bytes
    slot = insert(banks, odd)
    assert before - banks.free_bytes == banks.num_bytes(odd) == banks.remove(slot)


def _cut(weights: LoraWeights, num_inputs: int) -> LoraWeights:
    return replace(weights, a=weights.a[:1, :num_inputs], b=weights.b[:3, :1])
