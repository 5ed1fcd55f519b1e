"""The engine's steps from their programs: the bits that Python's steps give, whatever comes and goes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engine_driver import Driver
from support.sequences import sequence
from support.tiny import hf_lora, random_tokens, tiny_gpt2, tiny_llama, tiny_t5

from quiver_peft import CanonicalAdaptersPEFTConfig, IA3PEFTConfig, PtuningPEFTConfig
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.t5 import T5Base
from quiver_peft.kernels.cpp.library import library
from quiver_server.engine.sequence import Sequence

RANKS = (1, 4, 9)


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if library() is None:
        pytest.skip("there are no programs without the compiled kernels")


class Answers:
    """Runs the same requests through an engine and keeps every step's logits."""

    def __init__(self, folder: Path, adapters: list[AdapterWeights], *, with_programs: bool) -> None:
        base = load_base(folder)
        pack(base)
        self.driver = Driver(base, num_blocks=200, max_step_tokens=24)
        if not with_programs:
            self.driver.runner._step_graphs = None  # pyright: ignore[reportPrivateUsage]
        self.slots = [0, *(self.driver.banks.insert(weights) or 0 for weights in adapters)]
        self.num_virtual = [0, *(weights.num_virtual_tokens for weights in adapters)]
        self.logits: list[torch.Tensor] = []
        run = self.driver.runner.run

        def keep(batch: object) -> torch.Tensor:
            self.logits.append(run(batch))  # pyright: ignore[reportArgumentType]
            return self.logits[-1]

        self.driver.runner.run = keep  # pyright: ignore[reportAttributeAccessIssue]
        self.is_t5 = hasattr(base, "encoder")

    def ask(self, slots: list[int], seed: int) -> list[list[int]]:
        """Prompts and answers of many lengths, so that every step differs from the last."""
        items: list[Sequence] = []
        for i, slot in enumerate(slots):
            ids = random_tokens(1 + 7 * i, seed=seed + i).tolist()
            item = sequence([0] if self.is_t5 else ids, self.slots[slot], params={"max_new_tokens": 3 + 2 * i})
            item.num_virtual_tokens = self.num_virtual[slot]
            if self.is_t5:
                item.encoder_input = ids
            items.append(item)
        return self.driver.run(items)


def all_methods(folder: Path) -> list[AdapterWeights]:
    """LoRA of several ranks, IA3, canonical adapters, and virtual tokens where they stand in the decoder's rows."""
    base = load_base(folder)
    loras: list[AdapterWeights] = []
    for rank in RANKS:
        path = folder.parent / str(rank)
        hf_lora(folder, path, rank=rank, targets="all-linear", seed=rank)
        loras.append(read_adapter(path, base))
    configs: list[PEFTConfig] = [IA3PEFTConfig(), CanonicalAdaptersPEFTConfig(adapter_dim=6, norm_position="post")]
    if not isinstance(base, T5Base):
        configs.append(PtuningPEFTConfig(virtual_tokens=3))
    made = [TrainableAdapter.create(base, [config]) for config in configs]
    for adapter in made:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return [*loras, *(adapter.eval().weights(base) for adapter in made)]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_t5])
def test_the_same_bits(make_model: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make_model(folder)
    adapters = all_methods(folder)
    fast, plain = (Answers(folder, adapters, with_programs=value) for value in (True, False))
    everyone = list(range(len(adapters) + 1))
    for batch, slots in enumerate(([0], [1], [0, 1, 2, 3, 1], [0, 0], [3, 2, 2], [4, 4, 5], everyone, everyone)):
        assert fast.ask(slots, seed=10 * batch) == plain.ask(slots, seed=10 * batch)
    # An adapter goes, and another takes its memory.
    for answers in (fast, plain):
        answers.driver.banks.remove(answers.slots[2])
        answers.slots[2] = answers.driver.banks.insert(adapters[2]) or 0
    assert fast.ask([2, 1, 3], seed=50) == plain.ask([2, 1, 3], seed=50)
    assert len(fast.logits) == len(plain.logits)
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    programs = fast.driver.runner._step_graphs  # pyright: ignore[reportPrivateUsage]
    assert programs is not None
    made = programs._graphs  # pyright: ignore[reportPrivateUsage]
    assert made and all(program is not None for program in made.values())


def test_adapters_on_different_layers_share_a_program(tmp_path: Path) -> None:
    """Any two of many adapters meet in a batch: a program for each pair would be made again and again."""
    folder = tmp_path / "base"
    tiny_llama(folder)
    base = load_base(folder)
    adapters: list[AdapterWeights] = []
    for targets in (("q_proj", "v_proj"), ("o_proj",), ("up_proj", "down_proj"), ("gate_proj", "k_proj")):
        path = tmp_path / "-".join(targets)
        hf_lora(folder, path, targets=targets)
        adapters.append(read_adapter(path, base))
    fast, plain = (Answers(folder, adapters, with_programs=value) for value in (True, False))
    for slots in ([1, 2], [2, 3], [3, 4], [1, 4], [0, 1], [2, 3, 4, 1]):
        assert fast.ask(slots, seed=3) == plain.ask(slots, seed=3)
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    programs = fast.driver.runner._step_graphs  # pyright: ignore[reportPrivateUsage]
    assert programs is not None
    # Of the base alone, when only its row was left, and of LoRA.
    assert len(programs._graphs) <= 2  # pyright: ignore[reportPrivateUsage]
