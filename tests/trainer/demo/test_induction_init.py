"""A base with a head start attends as it should from birth, and learns to copy far sooner than one without."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quiver_demo.pretrain.gpt import HF_CONFIG, repeated_phrases
from quiver_demo.pretrain.induction_init import init_induction_heads
from quiver_demo.pretrain.phases import Recipe, make_optimizers
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.gpt import GPTBase

VOCABULARY = 2048


def fresh_base(head_start: bool, **changes: object) -> GPTBase:
    torch.manual_seed(3)
    base = GPTBase(FAMILIES["llama"].read_config({**HF_CONFIG, **changes}))
    if head_start:
        init_induction_heads(base)
    return base


def phrases(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(1, VOCABULARY, (50_000,), generator=generator)
    return repeated_phrases(stream, count, 129, generator)


def copying_loss(base: GPTBase, rows: Tensor) -> Tensor:
    """Of the last tokens of each row, which were all said before."""
    logits = base.logits(base(rows[:, :-1]))[:, 100:]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 101:].flatten())


@pytest.mark.slow
def test_thirty_steps_are_enough_to_begin_to_copy() -> None:
    after: dict[bool, float] = {}
    for head_start in (False, True):
        base = fresh_base(head_start)
        opts = make_optimizers(base, Recipe())
        for step in range(30):
            for opt in opts:
                opt.zero_grad()
            copying_loss(base, phrases(8, step)).backward()
            for opt in opts:
                opt.step()
        with torch.no_grad():
            after[head_start] = copying_loss(base, phrases(16, 999)).item()
    assert after[True] < 6.0 < 7.0 < after[False]


def test_at_birth_the_token_that_followed_is_proposed() -> None:
    base = fresh_base(True)
    tokens = torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(1))[:12] + 1
    rows = tokens.repeat(2)[None]  # the second time, each next token is known
    with torch.no_grad():
        logits = base.logits(base(rows[:, :-1]))[0, 12:]
    ranks = (logits > logits.gather(1, rows[0, 13:, None])).sum(-1)
    assert (ranks < 20).float().mean() > 0.8, ranks
    with torch.no_grad():
        logits = (plain := fresh_base(False)).logits(plain(rows[:, :-1]))[0, 12:]
    ranks = (logits > logits.gather(1, rows[0, 13:, None])).sum(-1)
    assert (ranks < 20).float().mean() < 0.2


def test_it_needs_two_layers() -> None:
    with pytest.raises(ValueError, match="a head start needs rotary positions and two layers"):
        init_induction_heads(fresh_base(False, num_hidden_layers=1))


def test_repeated_phrases_repeat() -> None:
    for row in phrases(20, 5):
        period = next(n for n in range(8, 100) if torch.equal(row[:-n], row[n:]))
        assert 8 <= period < 100
    assert phrases(0, 1).shape == (0, 129)
