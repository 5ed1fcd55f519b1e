"""Batches: every row once an epoch, within the limits, the same plan everywhere, and the loss at the right places."""

import random
from pathlib import Path

import pytest
from support.tiny import tiny_t5

from quiver_peft import GPT, T5
from quiver_peft.joint_forward import ModelInput
from quiver_trainer.data.batching import BatchLimits, collate, plan_epoch, sorted_by_length, to_batches
from quiver_trainer.data.jsonl import Sample

_GENERATOR = random.Random(5)
LENGTHS = [_GENERATOR.randint(2, 60) for _ in range(333)]


def sample(prompt: int, answer: int, first: int = 10) -> Sample:
    return Sample(list(range(first, first + prompt + answer)), prompt)


@pytest.mark.parametrize("limits", [BatchLimits(256, None), BatchLimits(None, 7), BatchLimits(300, 4)])
def test_an_epoch_gives_every_row_once_within_the_limits(limits: BatchLimits) -> None:
    plan = plan_epoch(range(len(LENGTHS)), LENGTHS, limits, seed=3, epoch=0)
    assert sorted(i for batch in plan for i in batch) == list(range(len(LENGTHS)))
    for batch in plan:
        assert limits.rows is None or len(batch) <= limits.rows
        assert limits.tokens is None or len(batch) * max(LENGTHS[i] for i in batch) <= limits.tokens


def test_epochs_and_seeds_differ_and_repeat() -> None:
    limits, places = BatchLimits(256, None), range(len(LENGTHS))
    runs = ((1, 0), (1, 1), (2, 0), (1, 0))
    plans = [plan_epoch(places, LENGTHS, limits, seed=seed, epoch=epoch) for seed, epoch in runs]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]


def test_rows_of_a_batch_are_of_like_length() -> None:
    def padding(plan: list[list[int]]) -> float:
        padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in plan)
        return 1 - sum(LENGTHS) / padded

    limits = BatchLimits(None, 8)
    in_order = list(to_batches(range(len(LENGTHS)), LENGTHS, limits))
    assert padding(plan_epoch(range(len(LENGTHS)), LENGTHS, limits, seed=0, epoch=0)) < 0.1 < 0.3 < padding(in_order)


def test_a_row_over_the_limit_is_a_batch_of_its_own() -> None:
    assert list(to_batches([0, 1, 2], [5, 500, 5], BatchLimits(100, None))) == [[0], [1], [2]]


def test_by_length_gives_all_samples() -> None:
    samples = [sample(n % 7 + 1, 2) for n in range(20)]
    batches = list(sorted_by_length(samples, BatchLimits(None, 6)))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    lengths = [len(s.tokens) for batch in batches for s in batch]
    assert lengths == sorted(lengths)


def test_the_loss_is_on_completions_alone(base_folder: Path) -> None:
    batch = collate([sample(3, 2), sample(1, 3, first=50)], GPT.from_pretrained(base_folder))
    # The last token of a row foretells nothing, so it is not read.
    assert batch.inputs == ModelInput([[10, 11, 12, 13], [50, 51, 52]])
    assert batch.targets == [13, 14, 51, 52, 53]
    # The token before each target, in all rows behind one another.
    assert batch.positions == [2, 3, 4, 5, 6]
    assert batch.num_tokens == 9 and batch.num_target_tokens == 7


def test_a_t5_reads_the_prompt_and_writes_the_completion(tmp_path: Path) -> None:
    tiny_t5(tmp_path)
    model = T5.from_pretrained(tmp_path)
    batch = collate([sample(3, 2), sample(1, 3, first=50)], model)
    start = model.base.config.start_token_id
    assert batch.inputs == ModelInput([[start, 13], [start, 51, 52]], sources=[[10, 11, 12], [50]])
    assert batch.targets == [13, 14, 51, 52, 53]
    assert batch.positions == [0, 1, 2, 3, 4]
    assert batch.num_tokens == 9
