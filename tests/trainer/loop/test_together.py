"""Many adapters on one base at once: each becomes what it would have become alone, and what befalls one is its own."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import tiny_t5, tiny_tokenizer
from torch import Tensor
from trainer.conftest import ROWS, write_rows

from quiver_peft import GPT, T5, load_model
from quiver_peft.adapters.formats.methods import write_methods
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import (
    DataSection,
    EvaluationSection,
    OptimizerSection,
    ScheduleSection,
    TrainConfig,
    TrainingInterrupted,
)
from quiver_trainer.errors import ConfigError, TrainingError
from quiver_trainer.loop.datasets import read_datasets
from quiver_trainer.loop.loop import train
from quiver_trainer.loop.run import Run
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.reports.terminal import Reporter
from quiver_trainer.trainer import fit_together

MakeConfig = Callable[..., TrainConfig]
LORA = {"method": "lora", "adapter_dim": 4, "target_modules": ["all"]}
SMALL_PTUNING = {"method": "ptuning", "virtual_tokens": 5, "bottleneck_dim": 16, "embedding_dim": 16}
METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [LORA],
    "lora-2": [{**LORA, "adapter_dim": 7, "alpha": 3.0, "variant": "canonical", "target_modules": ["attention"]}],
    "lora-dropout": [{**LORA, "adapter_dropout": 0.2}],
    "lora-dropout-pre": [{**LORA, "adapter_dropout": 0.3, "dropout_position": "pre"}],
    "dora": [{**LORA, "use_dora": True}],
    "ia3": [{"method": "ia3"}],
    "canonical": [{"method": "canonical", "adapter_dim": 6}],
    "canonical-dropout": [{"method": "canonical", "adapter_dim": 6, "norm_position": "post", "adapter_dropout": 0.2}],
    "ptuning": [SMALL_PTUNING],
    "ptuning-lstm": [{"method": "ptuning", "virtual_tokens": 3, "encoder": "lstm", "encoder_dropout": 0.2}],
    "prompt": [{"method": "prompt_tuning", "virtual_tokens": 4}],
    "prefix": [{"method": "prefix", "virtual_tokens": 3}],
    "ptuning-canonical": [SMALL_PTUNING, {"method": "canonical", "adapter_dim": 8}],
    "prefix-prompt": [{"method": "prefix", "virtual_tokens": 2}, {"method": "prompt_tuning", "virtual_tokens": 1}],
    "all-four": [LORA, {"method": "ia3"}, {"method": "canonical", "adapter_dim": 3}, SMALL_PTUNING],
}


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with a tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("t5")
    tiny_t5(folder)
    tiny_tokenizer(folder)
    return folder


def new_models(base: GPT | T5, configs: Sequence[TrainConfig]) -> list[AnyModel]:
    """One for each configuration, all on the same base object."""
    models: list[AnyModel] = []
    for config in configs:
        model = GPT(base.base) if isinstance(base, GPT) else T5(base.base)
        torch.manual_seed(config.seed)
        model.add_adapter([section.to_peft() for section in config.adapter or ()])
        models.append(model)
    return models


def fit_all(configs: Sequence[TrainConfig], **options: Any) -> list[Any]:
    models = new_models(load_model(configs[0].base), configs)
    return fit_together(list(zip(configs, models, strict=True)), **options)


def weights(config: TrainConfig) -> Mapping[str, Tensor]:
    return load_file(config.output / "adapter_model.safetensors")


def assert_same_result(together: TrainConfig, alone: TrainConfig) -> None:
    ours, expected = weights(together), weights(alone)
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max().item() <= 1e-5, name
    records = [json.loads((config.output / "quiver.json").read_text())["training"] for config in (together, alone)]
    for key in ("steps", "tokens", "exact_match", "num_trainable_parameters"):
        assert records[0][key] == records[1][key], key
    assert records[0]["validation_loss"] == pytest.approx(records[1]["validation_loss"], abs=1e-5)


def saved(model: AnyModel) -> Mapping[str, Tensor]:
    """The tensors of its artefact."""
    assert model.adapter is not None
    return write_methods(model.base, model.adapter.weights(model.base), "")[1]


def train_runs(base: AnyModel, configs: Sequence[TrainConfig], pass_tokens: int) -> dict[str, Run]:
    """Trained, not written: pictures take longer than these runs."""
    tokenizer, reporter = Tokenizer(configs[0].base), Reporter(quiet=True)
    over: dict[str, Run] = {}
    runs: list[Run] = []
    with ExitStack() as places:
        for config, model in zip(configs, new_models(base, configs), strict=True):
            places.enter_context(RunDirectory(config.output).lock())
            runs.append(Run(config, model, tokenizer, read_datasets(config, model, tokenizer, reporter), {}, reporter))
        train(
            runs,
            reporter,
            pass_tokens=pass_tokens,
            should_stop=lambda: False,
            on_over=lambda run: over.update({run.name: run}),
        )
    return over


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_each_method_becomes_what_it_becomes_alone(
    kind: str, base_folder: Path, t5_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Own rows, sizes of batches, rates, schedules, seeds and numbers of steps; 20 steps for most."""
    base = load_model(base_folder if kind == "gpt" else t5_folder)
    configs: list[TrainConfig] = []
    for i, (name, methods) in enumerate(METHODS.items()):
        rows = write_rows(tmp_path / f"rows-{i}.jsonl", ROWS[i % 3 :] + ROWS[: i % 3 + 2])
        configs.append(
            make_config(
                name,
                base=base_folder if kind == "gpt" else t5_folder,
                adapter=methods,
                data=DataSection(train=rows, validation=rows),
                evaluation=EvaluationSection(interval_steps=15, exact_match_samples=0),
                batch_size=2 + i % 3,
                epochs=100,
                max_steps=20 - i % 4,
                seed=i,
                schedule=ScheduleSection(kind="constant" if i % 2 else "cosine"),
                optimizer=OptimizerSection(learning_rate=1e-3 * (1 + i % 2), weight_decay=0.1),
            )
        )
    together = train_runs(base, configs, pass_tokens=300)
    for i, (config, model) in enumerate(zip(configs, new_models(base, configs), strict=True)):
        alone = train_runs(base, [config], pass_tokens=10**6)[config.output.name]
        run = together[config.output.name]
        assert run.progress.step == alone.progress.step == 20 - i % 4
        ours, expected, untrained = saved(run.model), saved(alone.model), saved(model)
        assert set(ours) == set(expected)
        for name, tensor in expected.items():
            assert (ours[name] - tensor).abs().max().item() <= 1e-5, f"{run.name}: {name}"
        moved = max((tensor - untrained[name]).abs().max().item() for name, tensor in expected.items())
        assert moved >= 1e-3, "nothing was learnt that could differ"
        losses = [run.progress.validation_records[-1].validation_loss for run in (run, alone)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def two_configs(make_config: MakeConfig, folder: str = "two", **settings: Any) -> list[TrainConfig]:
    plain: dict[str, Any] = {"epochs": 100, "max_steps": 12, "checkpoint_interval_steps": 5, **settings}
    return [
        make_config(f"{folder}/lora", adapter=[{**LORA, "adapter_dropout": 0.2}], seed=3, **plain),
        make_config(f"{folder}/ia3", adapter=[{"method": "ia3"}], seed=4, **plain),
    ]


def test_stopped_runs_go_on_to_the_same_bits(make_config: MakeConfig) -> None:
    whole, parts = two_configs(make_config, "whole"), two_configs(make_config, "parts")
    fit_all(whole)
    asked = iter(range(1000))
    with pytest.raises(TrainingInterrupted, match="stopped after step lora 7 of 12, ia3 7 of 12"):
        fit_all(parts, should_stop=lambda: next(asked) >= 7)
    assert not parts[0].output.exists()
    fit_all(parts)
    for one, other in zip(parts, whole, strict=True):
        assert all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(other).items())


def test_one_that_was_left_behind_catches_up_alone(make_config: MakeConfig) -> None:
    """A run that is finished already is left as it is, and the other becomes what it becomes alone."""
    first, second = two_configs(make_config)
    fit_all([first])
    results = fit_all([first, second])
    assert [result.was_finished for result in results] == [True, False]
    (alone,) = two_configs(make_config, "alone")[1:]
    fit_all([alone])
    assert_same_result(second, alone)


def test_one_that_fails_fails_alone(make_config: MakeConfig) -> None:
    bad, good = two_configs(make_config)
    bad = bad.model_copy(update={"optimizer": OptimizerSection(learning_rate=1e30, max_gradient_norm=None)})
    results = fit_all([bad, good])
    assert isinstance(results[0], TrainingError) and "lora: step" in str(results[0])
    assert not bad.output.exists()
    (alone,) = two_configs(make_config, "alone")[1:]
    fit_all([alone])
    assert_same_result(good, alone)


def test_what_cannot_be_together_is_refused(make_config: MakeConfig) -> None:
    one, two = two_configs(make_config)
    base = load_model(one.base)
    (model,) = new_models(base, [one])
    with pytest.raises(ConfigError, match="need names of their own, not lora, lora"):
        fit_together([(one, model), (one, model)])
    with pytest.raises(ConfigError, match="full fine-tuning changes the base"):
        fit_together([(one, model), (two, GPT.from_pretrained(one.base))])
    with pytest.raises(ConfigError, match="one and the same base"):
        fit_together([(one, model), (two, new_models(load_model(one.base), [two])[0])])
