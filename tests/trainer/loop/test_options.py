"""What a recipe may ask for beside the plain loop, each against what it must equal or must not do."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quiver_peft import GPT
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import EvaluationSection, OptimizerSection, ScheduleSection, TrainConfig, Trainer, TrainingError
from quiver_trainer.data.batching import BatchLimits
from quiver_trainer.loop.datasets import read_datasets
from quiver_trainer.loop.metrics import compare_texts, validation_metrics
from quiver_trainer.loop.run import Run
from quiver_trainer.reports.progress import Progress, ValidationRecord
from quiver_trainer.reports.terminal import Reporter

MakeConfig = Callable[..., TrainConfig]
LORA = {"method": "lora", "adapter_dim": 4, "target_modules": ["all"]}


def fit(config: TrainConfig, **options: Any) -> dict[str, Any]:
    model = GPT.from_pretrained(config.base, dtype=getattr(torch, config.dtype))
    torch.manual_seed(config.seed)
    model.add_adapter([section.to_peft() for section in config.adapter or ()])
    return dict(Trainer(config, **options).fit(model).record)


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(config.output / "adapter_model.safetensors")


def assert_same_weights(one: TrainConfig, other: TrainConfig, tolerance: float = 1e-6) -> None:
    for name, tensor in weights(one).items():
        assert (tensor - weights(other)[name]).abs().max().item() <= tolerance, name


def test_accumulated_batches_are_one_large_batch(make_config: MakeConfig) -> None:
    """The mean is over completion tokens: batches of other sizes and lengths weigh as much as they hold."""
    shared: dict[str, Any] = {
        "adapter": [LORA],
        "epochs": 5,
        "optimizer": OptimizerSection(learning_rate=3e-3),
        "schedule": ScheduleSection(kind="constant"),
    }
    large = make_config("large", batch_size=6, **shared)
    parts = make_config("parts", batch_size=4, accumulation=2, **shared)
    assert fit(large)["steps"] == fit(parts)["steps"] == 5
    assert_same_weights(large, parts)
    alone = make_config("alone", batch_size=4, **shared)
    assert fit(alone)["steps"] == 10
    with pytest.raises(AssertionError):
        assert_same_weights(large, alone)


def test_layers_computed_twice_give_the_same_weights(make_config: MakeConfig) -> None:
    dropout = {**LORA, "adapter_dropout": 0.3}
    kept = make_config("kept", adapter=[dropout], epochs=4)
    twice = make_config("twice", adapter=[dropout], epochs=4, checkpoint_activations=True)
    fit(kept)
    fit(twice)
    assert_same_weights(kept, twice, tolerance=0.0)


def test_layers_computed_twice_keep_less(make_config: MakeConfig) -> None:
    """Counted where autograd keeps it: what a pass saves for its gradients."""
    saved: list[int] = []
    model = GPT.from_pretrained(make_config().base)
    model.add_adapter(make_config(adapter=[LORA]).adapter[0].to_peft())  # pyright: ignore[reportOptionalSubscript]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    sizes: list[int] = []
    for recomputes in (False, True):
        saved.clear()
        model.base.recomputes = recomputes
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden(torch.randint(5, 100, (4, 60)))
        sizes.append(sum(saved))
    assert 5 * sizes[1] < sizes[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_half_the_size_trains_an_adapter_in_float32(dtype: str, make_config: MakeConfig) -> None:
    config = make_config(adapter=[LORA], dtype=dtype, epochs=30, optimizer=OptimizerSection(learning_rate=2e-2))
    record = fit(config)
    assert record["validation_loss"] < 0.2 * record["validation_loss_at_start"]
    assert {tensor.dtype for tensor in weights(config).values()} == {torch.float32}


def test_a_gradient_that_overflows_in_float16_is_left_out(make_config: MakeConfig) -> None:
    base = make_config().base
    config = make_config(adapter=[LORA], dtype="float16")
    reporter, tokenizer = Reporter(quiet=True), Tokenizer(base)
    model = GPT.from_pretrained(base, dtype=torch.float16)
    model.add_adapter([section.to_peft() for section in config.adapter or ()])
    run = Run(config, model, tokenizer, read_datasets(config, model, tokenizer, reporter), {}, reporter)
    run.run_directory.folder.mkdir()
    run.begin()
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    for parameter in run.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    run.take_step(run.next_batches(), 2.0, 0.1)
    assert run.failure is None and run.progress.step == 1 and run.loss_scale == 2.0**11
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.parameters.items())
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter) * run.loss_scale
    run.take_step(run.next_batches(), 2.0, 0.1)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in run.parameters.items())


RISING = OptimizerSection(learning_rate=0.3, max_gradient_norm=None)


def test_a_run_stops_when_nothing_gets_better(make_config: MakeConfig) -> None:
    settings = EvaluationSection(interval_steps=2, exact_match_samples=0, patience=3)
    config = make_config(adapter=[LORA], epochs=100, evaluation=settings, optimizer=RISING, max_loss_rise=None)
    record = fit(config)
    assert record["stopped_early"] and record["steps"] < 100
    again = fit(config)
    assert again == record, "it is finished"


def test_the_best_weights_are_kept(make_config: MakeConfig) -> None:
    def config(name: str, **settings: Any) -> TrainConfig:
        evaluation = EvaluationSection(interval_steps=2, exact_match_samples=0, **settings)
        optimizer = OptimizerSection(learning_rate=0.05, max_gradient_norm=None)
        return make_config(
            name, adapter=[LORA], epochs=10, evaluation=evaluation, optimizer=optimizer, max_loss_rise=None
        )

    last, best = config("last"), config("best", keep="best")
    records = fit(last), fit(best)
    curve = [r["validation_loss"] for r in _validations(best)]
    assert records[1]["validation_loss"] == min(curve) and records[1]["kept_step"] == 2 * curve.index(min(curve))
    assert records[0]["validation_loss"] == curve[-1]
    model = GPT.from_pretrained(best.base)
    model.load_adapters(best.output)
    tokenizer = Tokenizer(best.base)
    data = read_datasets(best, model, tokenizer, Reporter(quiet=True))["validation"]
    assert validation_metrics(model, data, BatchLimits(None, 3)).loss == pytest.approx(min(curve), abs=1e-5)


def _validations(config: TrainConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def test_a_run_that_diverges_is_stopped(make_config: MakeConfig) -> None:
    wild = OptimizerSection(learning_rate=3.0, max_gradient_norm=None)
    rising = ScheduleSection(warmup_fraction=1.0)
    config = make_config(adapter=[LORA], epochs=100, optimizer=wild, schedule=rising, max_loss_rise=0.2)
    with pytest.raises(TrainingError, match=r"step \d+: the smoothed loss was .* and is .*: it diverges. The last"):
        fit(config)
    assert not config.output.exists()


def test_the_lowest_loss_counts_once_the_average_is_warm() -> None:
    progress = Progress()
    for loss in [0.1] + [5.0] * 18:
        progress.add_step(loss, 1, 1, 1, 0.0)
    assert progress.loss_rise == 0.0
    for loss in [2.0] * 200 + [6.0] * 200:
        progress.add_step(loss, 1, 1, 1, 0.0)
    assert progress.loss_rise == pytest.approx(4.0, abs=0.01)


def test_the_best_measurement_is_known() -> None:
    progress = Progress()
    losses = [3.0, 2.0, 2.5, 2.0, 4.0]
    better = [progress.add_validation(ValidationRecord(i, 0, 0.0, loss, None)) for i, loss in enumerate(losses)]
    assert better == [True, True, False, False, False]
    assert (progress.best_step, progress.measured_since_best) == (1, 3)
    assert progress.kept_validation == progress.validation_records[1]


def test_overlap_is_rouge_and_bleu() -> None:
    same = compare_texts(["the cat sat on the mat"], ["the cat sat on the mat"], overlap=True)
    assert (same.exact_match, same.rouge_l) == (1.0, pytest.approx(1.0)) and same.bleu == pytest.approx(1.0)
    longer = compare_texts(["the cat sat on the mat now"], ["the cat sat on the mat"], overlap=True)
    # A precision of 6/7 and a recall of 1; and of one to four words in a row 6/7, 5/6, 4/5 and 3/4 are right.
    assert longer.exact_match == 0.0 and longer.rouge_l == pytest.approx(12 / 13)
    assert longer.bleu == pytest.approx((3 / 7) ** 0.25)
    plain = compare_texts(["a"], ["a "], overlap=False)
    assert (plain.exact_match, plain.rouge_l, plain.bleu) == (1.0, None, None)
