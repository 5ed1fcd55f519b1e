"""`quiver train` with several runs: one base in memory, all adapters at once, one comparison report."""

from collections.abc import Callable

import torch

from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.device import choose_device
from quiver_peft.model import AnyModel, load_model, model_of
from quiver_trainer.errors import ConfigError, TrainingError
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.recipe.sweep import ManyRecipe
from quiver_trainer.reports.comparison import PICTURE_FILE, TABLE_FILE, RunSummary, comparison_table, write_comparison
from quiver_trainer.reports.terminal import Reporter
from quiver_trainer.trainer import fit_together


def train_many(recipe: ManyRecipe, *, restart: bool, should_stop: Callable[[], bool], reporter: Reporter) -> None:
    """Train all runs and write their comparison. Raises what `fit_together` raises, and TrainingError when any run
    failed, after all others are done."""
    configs = recipe.configs
    if any(config.adapter is None for config in configs):
        raise ConfigError("full fine-tuning changes the base, so it cannot run beside other trainings of it")
    device = choose_device(configs[0].device)
    base = load_model(configs[0].base, dtype=getattr(torch, configs[0].dtype), device=device).base
    jobs = [(config, _new_model(base, config)) for config in configs]
    trained = sum(p.numel() for _, model in jobs for p in model.trainable_parameters())
    reporter.note(
        f"{len(jobs)} adapters on {configs[0].base.name} "
        f"({sum(p.numel() for p in base.parameters()):,} parameters, {trained:,} trained), {device}"
    )
    results = fit_together(
        jobs, restart=restart, reporter=reporter, should_stop=should_stop, pass_tokens=recipe.pass_tokens
    )
    compared = [
        RunSummary(config.output.name, _methods(config), None if isinstance(result, TrainingError) else result.record)
        for config, result in zip(configs, results, strict=True)
    ]
    write_comparison(recipe.folder, compared)
    reporter.show(comparison_table(compared))
    reporter.note(f"written: {recipe.folder}, with {TABLE_FILE} and {PICTURE_FILE}")
    if failures := [result for result in results if isinstance(result, TrainingError)]:
        raise TrainingError("\n".join(map(str, failures)))


def _new_model(base: GPTBase | T5Base, config: TrainConfig) -> AnyModel:
    """The shared base with a freshly initialized adapter, seeded as in a run of its own."""
    model = model_of(base)
    torch.manual_seed(config.seed)
    model.add_adapter([section.to_peft() for section in config.adapter or ()])
    return model


def _methods(config: TrainConfig) -> str:
    return " + ".join(section.method for section in config.adapter or ())
