"""Making the T5 base: a circuit that copies from birth, rows of three kinds, and a folder that transformers loads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from quiver_demo.pretrain.induction_init_t5 import init_induction_heads
from quiver_demo.pretrain.phases import Windows
from quiver_demo.pretrain.t5 import DENOISED, HF_CONFIG, RECIPE, make_base, noisy, sources_and_targets
from quiver_peft import T5
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.t5 import T5Base

STREAM = torch.randint(1, 2048, (5000,), generator=torch.Generator().manual_seed(2)).to(torch.int16)


def fresh_base(head_start: bool, **changes: object) -> T5Base:
    torch.manual_seed(3)
    base = T5Base(T5_FAMILIES["t5"].read_config({**HF_CONFIG, **changes}))
    if head_start:
        init_induction_heads(base)
    return base


@torch.no_grad()
def share_copied(base: T5Base) -> float:
    """How often the most likely token is the one that follows, in the source, the token just written."""
    source = torch.stack(
        [torch.randperm(2047, generator=torch.Generator().manual_seed(seed))[:60] + 1 for seed in range(4)]
    )
    logits = T5(base)(source, source)[:, :-1]
    return (logits.argmax(-1) == source[:, 1:]).float().mean().item()


def test_at_birth_the_token_that_followed_is_proposed() -> None:
    assert share_copied(fresh_base(True)) > 0.9
    assert share_copied(fresh_base(False)) < 0.1


@pytest.mark.parametrize("changes", [{"d_kv": 16}, {"num_decoder_layers": 1}, {"d_model": 128}])
def test_it_needs_sizes_that_hold_the_circuit(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a head start needs two layers and four heads"):
        init_induction_heads(fresh_base(False, **changes))


def rows_at(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    windows = Windows(STREAM, RECIPE.sequence_tokens, generator)
    return sources_and_targets(windows, RECIPE, step, STREAM, generator)


@pytest.mark.parametrize("step", [0, RECIPE.copy_steps])
def test_a_step_has_rows_of_every_kind(step: int) -> None:
    source, target = rows_at(step)
    assert len(source) == len(target) == RECIPE.sequences
    assert source.shape[1] + target.shape[1] == RECIPE.sequence_tokens
    num_copies = RECIPE.copies if step < RECIPE.copy_steps else 0
    whole = torch.cat((source, target), dim=1)[: -DENOISED - num_copies]
    starts = STREAM.long().unfold(0, RECIPE.sequence_tokens, 1)
    assert all(bool((starts == row).all(-1).any()) for row in whole), "a document and what follows"
    shorter = min(source.shape[1], target.shape[1])
    same = source[-DENOISED - num_copies :, :shorter] == target[-DENOISED - num_copies :, :shorter]
    assert all(0.75 < share < 1 for share in same[:DENOISED].float().mean(1).tolist()), "denoising"
    assert bool(same[DENOISED:].all()), "copying"


def test_sources_have_different_lengths() -> None:
    assert len({rows_at(0, seed)[0].shape[1] for seed in range(6)}) > 3


def test_noise_changes_about_its_share() -> None:
    rows = torch.zeros(50, 100, dtype=torch.int64)
    changed = noisy(rows, 2048, torch.Generator().manual_seed(0))
    assert 0.08 < (changed != rows).float().mean() < 0.12


@pytest.mark.slow
def test_a_short_run_makes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    make_base(
        tmp_path,
        replace(
            RECIPE,
            steps=3,
            sequences=10,
            sequence_tokens=64,
            warmup_steps=1,
            instructed_steps=2,
            instructed_characters=60_000,
            num_set_aside=4,
        ),
        120_000,
    )
    _check_against_transformers(tmp_path)
    assert "make demo-base BASE=t5" in (tmp_path / "README.md").read_text()


def test_the_bundled_base_is_small_and_whole() -> None:
    folder = Path("trainer/demo/base-t5")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 * 2**20
    _check_against_transformers(folder)


@torch.no_grad()
def _check_against_transformers(folder: Path) -> None:
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    source = torch.tensor([AutoTokenizer.from_pretrained(folder)("Ticket from Anna")["input_ids"]])
    target = F.pad(source[:, :-1], (1, 0))
    ours = T5.from_pretrained(folder)(source, target)
    assert torch.allclose(ours, theirs(input_ids=source, decoder_input_ids=target).logits, atol=1e-4)
