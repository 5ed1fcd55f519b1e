"""`Trainer`: `fit` trains a model and writes the output folder, `predict` answers prompts.

`fit_together` trains many adapters on one frozen base in one process.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.errors import ConfigError, TrainingError
from quiver_trainer.loop.datasets import read_datasets
from quiver_trainer.loop.fingerprint import run_settings
from quiver_trainer.loop.loop import train
from quiver_trainer.loop.output import write_result
from quiver_trainer.loop.predict import predict_texts
from quiver_trainer.loop.run import Run
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.recipe.config import DEFAULT_BATCH_TOKENS, TrainConfig
from quiver_trainer.reports.terminal import Reporter


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run. revision: of the adapter, "" after full fine-tuning. record: the training record.

    was_finished: the result existed already, nothing was trained.
    """

    revision: str
    record: Mapping[str, Any]
    was_finished: bool = False


class Trainer:
    """Trains a model's trainable parameters: its adapter, or all of them.

    config: `adapter`, `device` and `dtype` are ignored here; the model's own adapter is trained.
    restart: discard an unfinished or finished run in the output folder. should_stop: called before each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        restart: bool = False,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._restart = restart
        self._reporter = reporter or Reporter()
        self._should_stop = should_stop

    def fit(self, model: AnyModel) -> TrainingResult:
        """Train, or resume an interrupted training of the same settings, and write the output folder atomically.

        With an adapter only its weights are saved; without, a Hugging Face folder of the fine-tuned base.
        Seeds torch's global random generator. Raises ConfigError, DataError, TrainingError, TrainingInterrupted.
        """
        torch.manual_seed(self._config.seed)
        (result,) = fit_together(
            [(self._config, model)], restart=self._restart, reporter=self._reporter, should_stop=self._should_stop
        )
        if isinstance(result, TrainingError):
            raise result
        return result

    def predict(self, model: AnyModel, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """The model's greedy answer to each prompt, without the prompt. Raises DataError for a prompt too long."""
        return predict_texts(model, Tokenizer(self._config.base), prompts, max_new_tokens=max_new_tokens)


def fit_together(
    jobs: Sequence[tuple[TrainConfig, AnyModel]],
    *,
    restart: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    pass_tokens: int = DEFAULT_BATCH_TOKENS,
) -> list[TrainingResult | TrainingError]:
    """As `Trainer.fit` for each of several models on one and the same base object, all of them at once.

    Each result equals that of its training alone and is written as soon as it is finished. A failed run
    returns its error; the others continue. pass_tokens: see `train`.
    Raises ConfigError, DataError before anything was started; TrainingInterrupted.
    """
    reporter = reporter or Reporter()
    _check_together(jobs)
    tokenizer = Tokenizer(jobs[0][0].base)
    results: dict[str, TrainingResult | TrainingError] = {}
    with ExitStack() as places:
        runs: list[Run] = []
        for config, model in jobs:
            places.enter_context(RunDirectory(config.output).lock())
            prepared = _prepare(config, model, tokenizer, restart, reporter)
            if isinstance(prepared, Run):
                runs.append(prepared)
            else:
                results[config.output.name] = prepared

        def keep(run: Run) -> None:
            if run.failure is not None:
                results[run.name] = run.failure
                return
            run.finish()
            results[run.name] = TrainingResult(*write_result(run, tokenizer))
            run.run_directory.remove()

        train(runs, reporter, pass_tokens=pass_tokens, should_stop=should_stop, on_over=keep)
    return [results[config.output.name] for config, _ in jobs]


def _prepare(
    config: TrainConfig, model: AnyModel, tokenizer: Tokenizer, restart: bool, reporter: Reporter
) -> Run | TrainingResult:
    """The prepared run, or the finished result."""
    methods = () if model.adapter is None else model.adapter.configs
    model.base.recomputes = config.checkpoint_activations
    settings = run_settings(config, model.base.fingerprint, [method.to_dict() for method in methods])
    workplace = RunDirectory(config.output)
    start = workplace.decide_start(settings, restart=restart)
    if start.kind == "finished":
        return TrainingResult(start.revision, start.record, was_finished=True)
    run = Run(config, model, tokenizer, read_datasets(config, model, tokenizer, reporter), settings, reporter)
    if start.kind == "resume":
        run.resume()
        reporter.note(f"{run.name}: going on after step {run.progress.step} of {run.num_steps}")
    else:
        workplace.clear()
    return run


def _check_together(jobs: Sequence[tuple[TrainConfig, AnyModel]]) -> None:
    names = [config.output.name for config, _ in jobs]
    if len(set(names)) < len(names):
        raise ConfigError(f"adapters that are trained together need names of their own, not {', '.join(names)}")
    if len(jobs) > 1 and any(model.adapter is None for _, model in jobs):
        raise ConfigError("full fine-tuning changes the base, so it cannot run beside other trainings of it")
    draws = any(model.adapter is not None and model.adapter.train().needs_rng for _, model in jobs)
    if len(jobs) > 1 and draws and any(config.checkpoint_activations for config, _ in jobs):
        raise ConfigError("checkpoint_activations: not for several adapters at once when any of them has dropout")
    if any(model.base is not jobs[0][1].base for _, model in jobs):
        raise ConfigError("adapters that are trained together must be on one and the same base")
