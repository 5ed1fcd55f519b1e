"""The learning rate from step to step, what decays, and what a run prints where there is no terminal."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from quiver_peft import GPT, IA3PEFTConfig, LoraPEFTConfig, PrefixPEFTConfig, PromptTuningPEFTConfig, PtuningPEFTConfig
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_trainer import OptimizerSection, ScheduleSection
from quiver_trainer.loop.optimizer import make_optimizer, peak_rate, peak_rates, rate_factor, set_learning_rate
from quiver_trainer.loop.run import trainable
from quiver_trainer.recipe.methods import METHOD_SECTIONS
from quiver_trainer.reports.progress import Progress, ValidationRecord, record_interval
from quiver_trainer.reports.terminal import Reporter


def test_the_rate_rises_then_follows_half_a_cosine() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_fraction=0.1)
    rates = [2.0 * rate_factor(step, 100, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.002
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_constant_rate_is_constant() -> None:
    schedule = ScheduleSection(kind="constant", warmup_fraction=0.0)
    assert {rate_factor(step, 9, schedule) for step in range(9)} == {1.0}


def test_a_line_ends_where_it_is_told_to() -> None:
    schedule = ScheduleSection(kind="linear", warmup_fraction=0.0, final_fraction=0.2)
    assert [rate_factor(step, 4, schedule) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_only_matrices_decay() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer({"a": matrix, "b": vector}, OptimizerSection(weight_decay=0.5), {"a": 1.0, "b": 1.0})
    assert set_learning_rate(optimizer, 0.1) == 0.1
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert vector.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("config", [PromptTuningPEFTConfig(2), PtuningPEFTConfig(2), PrefixPEFTConfig(2)])
def test_virtual_tokens_do_not_decay(config: PEFTConfig, base_folder: Path) -> None:
    model = GPT.from_pretrained(base_folder)
    model.add_adapter([config, LoraPEFTConfig(adapter_dim=2)])
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, OptimizerSection(weight_decay=0.5), dict.fromkeys(parameters, 1.0))
    decayed, kept = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    (rows,) = (id(p) for name, p in model.named_parameters() if name.endswith("encoder.embedding"))
    assert rows in kept and rows not in decayed and len(decayed) > 2


def test_a_rate_that_is_not_set_suits_the_method() -> None:
    unset = OptimizerSection()
    rates = {method: peak_rate(unset, method) for method in METHOD_SECTIONS}
    assert rates == {
        "lora": 2e-4, "canonical": 2e-4, "ptuning": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt_tuning": 3e-2
    }  # fmt: skip
    assert peak_rate(unset, "") == 2e-4
    assert peak_rate(OptimizerSection(learning_rate=0.5), "lora") == 0.5
    own = OptimizerSection(learning_rate={"ia3": 0.25})
    assert (peak_rate(own, "ia3"), peak_rate(own, "lora")) == (0.25, 2e-4)


def test_each_method_of_an_adapter_has_its_own_rate_and_scales_do_not_decay(base_folder: Path) -> None:
    model = GPT.from_pretrained(base_folder)
    model.add_adapter([IA3PEFTConfig(), LoraPEFTConfig(adapter_dim=2)])
    assert model.adapter is not None
    parameters = trainable(model)
    names = [method.name for method in model.adapter.ordered_methods]
    settings = OptimizerSection(weight_decay=0.5)
    optimizer = make_optimizer(parameters, settings, peak_rates(parameters, settings, names))
    set_learning_rate(optimizer, 0.5)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    ia3, lora = (next(m for m in model.adapter.ordered_methods if m.name == name) for name in ("ia3", "lora"))
    assert {found[id(p)] for p in ia3.parameters()} == {(2.5e-3, 0.0)}
    assert {found[id(p)] for p in lora.parameters()} == {(1e-4, 0.5)}


def test_progress_comes_back_from_json_bit_for_bit() -> None:
    progress = Progress()
    for i in range(7):
        progress.add_step(0.1 * i + 1 / 3, 5, 40, 1, 0.01)
    progress.close_window(0.7, 1e-3, 2.0)
    progress.add_step(1 / 7, 3, 20, 2, 0.02)
    progress.validation_records.append(ValidationRecord(7, 280, 1.0, 1 / 9, None))
    assert Progress.from_json(progress.to_json()) == progress


def test_a_window_averages_over_completion_tokens() -> None:
    progress = Progress()
    progress.add_step(1.0, 10, 50, 1, 0.5)
    progress.add_step(4.0, 30, 70, 1, 0.5)
    record = progress.close_window(0.5, 1e-3, 1.0)
    assert record.train_loss == pytest.approx(130 / 40)
    assert record.tokens_per_second == pytest.approx(120)
    assert (record.step, record.tokens) == (2, 120)


def test_a_long_run_leaves_about_two_hundred_records() -> None:
    assert [record_interval(n) for n in (1, 199, 400, 10_000)] == [1, 1, 2, 50]


def test_a_pipe_gets_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    with reporter.training(0, 200, several=False):
        for _ in range(200):
            reporter.step("routing", 0.5, 100, 0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "step 20/200  loss 0.500  1,000 tokens/s  18 s left"


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.note("a note")
    reporter.warn("left out 3 rows")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "warning: left out 3 rows" in printed.err
