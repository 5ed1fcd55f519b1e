"""`quiver train`: trains an adapter, or a whole base, from a recipe."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from quiver_peft.base.checkpoint import fingerprint
from quiver_peft.device import choose_device
from quiver_peft.errors import QuiverError
from quiver_peft.model import AnyModel, load_model
from quiver_trainer.cli.signals import StopRequest, stop_on_signals
from quiver_trainer.cli.train_many import train_many
from quiver_trainer.command import command_parser, report
from quiver_trainer.errors import ConfigError, TrainingInterrupted
from quiver_trainer.loop.fingerprint import run_settings
from quiver_trainer.loop.output import CURVE_FILE
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.recipe.help import list_settings, to_recipe
from quiver_trainer.recipe.sweep import ManyRecipe, load_recipes
from quiver_trainer.reports.terminal import Reporter
from quiver_trainer.trainer import Trainer, TrainingResult

_DESCRIPTION = """\
Train an adapter (or fine-tune a whole base) from a recipe, a YAML file such as

  base: models/demo-base              # a Hugging Face folder
  output: adapters/routing            # becomes the adapter folder; "routing" is its id when it is served
  adapter:                            # adapter: null would fine-tune the whole base
    method: lora
    adapter_dim: 16
    target_modules: [attention, mlp]
  data:
    train: data/routing/train.jsonl   # lines of {"prompt": "...", "completion": "..."}
    validation: data/routing/validation.jsonl
  epochs: 3
  optimizer:
    learning_rate: 2e-3

and train it with

  quiver train routing.yaml
  quiver train routing.yaml epochs=5 optimizer.learning_rate=1e-3 output=adapters/routing-2

Many adapters train at once on one base in memory, each to the result that it would reach alone:

  base: models/demo-base
  output: adapters                    # one folder for each run, comparison.md and comparison.png beside them
  batch_size: 16                      # whatever the runs share
  jobs:                               # {id: what is its own}
    routing: {adapter: {method: lora}, data: {train: data/routing.jsonl}}
    extract: {adapter: {method: ia3}, data: {train: data/extract.jsonl}}
  sweep:                              # every value of every key with every other; also without jobs
    optimizer.learning_rate: [1e-3, 3e-3]
  pass_tokens: 4096                   # about how many tokens go through the base together: bounds the memory

Over several GPUs, machines or CPUs (parallel.tensor cuts the base; what is left of the processes deals the rows):

  torchrun --nproc-per-node 8 -m quiver_trainer routing.yaml parallel.tensor=4 parallel.sequence=true

Relative paths start at the folder of the YAML file; in key=value, at the shell's current folder.
A run that was stopped or killed goes on from its last checkpoint when the same command is given again.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    try:
        options = _parser().parse_intermixed_args(argv)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    with stop_on_signals() as stop:
        try:
            return _run(options, stop)
        except TrainingInterrupted as error:
            print(f"quiver train: {error}; the same command goes on from there:\n  {_command(argv)}", file=sys.stderr)
            return stop.exit_code
        except (QuiverError, OSError) as error:
            return report("quiver train", error)


def _parser() -> argparse.ArgumentParser:
    settings = f"keys of a recipe, their defaults and meanings:\n\n{list_settings()}\n\n"
    parser = command_parser("quiver train", _DESCRIPTION, settings)
    parser.add_argument("recipe", type=Path, metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe; dots go down")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe with its defaults, and end")
    parser.add_argument("--restart", action="store_true", help="start over, whatever is in the output folder")
    return parser


def _run(options: argparse.Namespace, stop: StopRequest) -> int:
    recipe = load_recipes(options.recipe, options.overrides)
    reporter = Reporter()
    if options.print_config:
        configs = recipe.configs if isinstance(recipe, ManyRecipe) else [recipe]
        print("\n".join(to_recipe(config) for config in configs), end="")
    elif _is_started_by_torchrun():
        if isinstance(recipe, ManyRecipe):
            raise ConfigError(f"{options.recipe}: many runs train in one process; start each of them alone by torchrun")
        _train_over_ranks(recipe, options.restart, stop)
    elif isinstance(recipe, ManyRecipe):
        train_many(recipe, restart=options.restart, should_stop=stop, reporter=reporter)
    else:
        _train_one(recipe, options.restart, stop, reporter)
    return 0


def _is_started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(os.environ)


def _train_over_ranks(config: TrainConfig, restart: bool, stop: StopRequest) -> None:
    # Megatron-Core is imported here and in no other case.
    from quiver_trainer.parallel.launch import train_over_ranks

    is_first = os.environ["RANK"] == "0"
    reporter = Reporter(quiet=not is_first, warns=is_first)
    result = train_over_ranks(config, restart=restart, reporter=reporter, should_stop=stop)
    if not result.was_finished:
        _conclude(config, result, reporter)


def _train_one(config: TrainConfig, restart: bool, stop: StopRequest, reporter: Reporter) -> None:
    methods = [section.to_peft() for section in config.adapter or ()]
    settings = run_settings(config, fingerprint(config.base), [method.to_dict() for method in methods])
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"parallel.tensor: {config.parallel.tensor} needs as many processes, or a multiple; start them by\n"
            f"  torchrun --nproc-per-node {config.parallel.tensor} -m quiver_trainer CONFIG.yaml key=value ..."
        )
    # Asked before the base is loaded, so that a run that is done or cannot begin says so at once.
    start = RunDirectory(config.output).decide_start(settings, restart=restart)
    if start.kind == "finished":
        reporter.note(f"{config.output}: this training is finished already; --restart trains again")
        return
    device = choose_device(config.device)
    model = load_model(config.base, dtype=getattr(torch, config.dtype), device=device)
    torch.manual_seed(config.seed)
    if methods:
        model.add_adapter(methods)
    _introduce(config, model, device, reporter)
    result = Trainer(config, restart=restart, reporter=reporter, should_stop=stop).fit(model)
    _conclude(config, result, reporter)


def _introduce(config: TrainConfig, model: AnyModel, device: torch.device, reporter: Reporter) -> None:
    total = sum(parameter.numel() for parameter in model.base.parameters())
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    what = ", ".join(section.method for section in config.adapter or ()) or "full fine-tuning"
    reporter.note(
        f"{config.output.name}: {what} on {config.base.name} ({total:,} parameters, {trained:,} trained), {device}"
    )


def _conclude(config: TrainConfig, result: TrainingResult, reporter: Reporter) -> None:
    record = result.record
    rows = {"steps": f"{record['steps']:,}", "tokens": f"{record['tokens']:,}", "time": f"{record['seconds']:.1f} s"}
    rows["training loss"] = f"{record['train_loss']:.3f}"
    for key, name, form in (("validation_loss", "validation loss", ".3f"), ("exact_match", "exact match", ".1%")):
        if record[key] is not None:
            rows[name] = f"{format(record[f'{key}_at_start'], form)} -> {format(record[key], form)}"
    rows["written"] = str(config.output)
    rows["learning curve"] = str(config.output / CURVE_FILE)
    if result.revision:
        rows["revision"] = result.revision[:12]
    reporter.table(f"{config.output.name} is trained", rows)


def _command(argv: list[str]) -> str:
    return shlex.join(["quiver", "train", *(word for word in argv if word != "--restart")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
