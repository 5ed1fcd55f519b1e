"""Making the base: Muon's update is orthogonal, the rate rises and falls, and the folder loads in transformers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quiver_demo.pretrain.gpt import make_base
from quiver_demo.pretrain.muon import Muon, orthogonalize
from quiver_demo.pretrain.phases import Recipe, Windows, rate_factor
from quiver_peft.base.gpt import GPTBase


@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 40, 24), (3, 16, 16)])
def test_muon_makes_singular_values_about_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(update))
    assert torch.linalg.svdvals(update).max() > 5
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    update = torch.randn(1, 12, 20)
    u, _, vh = torch.linalg.svd(update[0], full_matrices=False)
    turned = u.T @ orthogonalize(update)[0] @ vh.T
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4


def test_muon_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 4))
    wanted, optimizer = torch.randn(6, 4), Muon([weight], lr=0.05, weight_decay=0.0)
    losses: list[float] = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (weight - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_rate_rises_then_falls_to_nothing() -> None:
    recipe = Recipe(steps=100, warmup_steps=10)
    factors = [rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(1 / 90)


def test_the_second_phase_is_gentler_and_reads_other_text() -> None:
    first = Recipe(steps=100, instructed_steps=30)
    second = first.instructed()
    assert (second.steps, second.copy_steps, second.sequences) == (30, 0, first.sequences // 2)
    assert second.muon_lr < first.muon_lr and second.adam_lr < first.adam_lr and second.seed != first.seed


def test_windows_give_the_whole_stream_once_before_anything_twice() -> None:
    windows = Windows(torch.arange(101), 10, torch.Generator().manual_seed(0))
    rows = torch.cat([windows.take(3), windows.take(7)])
    assert sorted(rows[:, 0].tolist()) == list(range(0, 100, 10)) != rows[:, 0].tolist()
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 11)) for row in rows)
    assert torch.equal(windows.take(1)[0], rows[0])


@pytest.mark.slow
def test_a_short_run_makes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    make_base(
        tmp_path,
        Recipe(
            steps=3,
            sequences=2,
            sequence_tokens=64,
            warmup_steps=1,
            instructed_steps=2,
            instructed_characters=60_000,
            num_set_aside=4,
        ),
        120_000,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("Ticket from Anna")["input_ids"]])
    base = GPTBase.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(base.logits(base(tokens)), theirs(tokens).logits, atol=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert "seed 7" in card and "32 instructed tickets; 0% of 4 others" in card


def test_the_bundled_base_is_small_and_whole() -> None:
    folder = Path("trainer/demo/base")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12 * 2**20
    base = GPTBase.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, base.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (base.logits(base(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
