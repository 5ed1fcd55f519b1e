"""Distributed training under torchrun, from the recipe to the output folder."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.base.checkpoint import fingerprint
from quiver_peft.model import AnyModel, model_of
from quiver_peft.parallel.adapters import gather_adapter, split_adapter
from quiver_peft.parallel.bases import gather_base, load_split_base
from quiver_peft.parallel.mesh import Mesh, start_mesh
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.errors import ConfigError, TrainingInterrupted
from quiver_trainer.loop.datasets import read_datasets
from quiver_trainer.loop.fingerprint import differences, run_settings
from quiver_trainer.loop.output import write_result
from quiver_trainer.loop.run import trainable
from quiver_trainer.loop.run_directory import RunDirectory, Start
from quiver_trainer.parallel.checkpoint import read_state
from quiver_trainer.parallel.run import ParallelRun
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.reports.terminal import Reporter
from quiver_trainer.trainer import TrainingResult


def train_over_ranks(
    config: TrainConfig,
    *,
    restart: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train, or resume an interrupted training of the same settings; every process calls this with the same arguments.

    The first process writes the output folder, as a single process would: an adapter or a Hugging Face folder. Raises
    what `Trainer.fit` raises. should_stop: true on one process stops all.
    """
    world, tensor = int(os.environ["WORLD_SIZE"]), config.parallel.tensor
    if world % tensor:
        raise ConfigError(f"parallel.tensor: {tensor} does not divide the {world} processes that were started")
    with start_mesh(tensor=tensor, sequence=config.parallel.sequence, device=config.device) as mesh:
        return train_on_mesh(config, mesh, restart=restart, reporter=reporter, should_stop=should_stop)


def train_on_mesh(
    config: TrainConfig,
    mesh: Mesh,
    *,
    restart: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """`train_over_ranks` on an initialized mesh."""
    return _Job(config, mesh, reporter or Reporter()).run(restart, should_stop)


class _Job:
    """The training job of one process."""

    def __init__(self, config: TrainConfig, mesh: Mesh, reporter: Reporter) -> None:
        self._config, self._mesh, self._reporter = config, mesh, reporter
        self._methods = [section.to_peft() for section in config.adapter or ()]
        self._workplace = RunDirectory(config.output)

    def run(self, restart: bool, should_stop: Callable[[], bool]) -> TrainingResult:
        config, mesh = self._config, self._mesh
        settings = run_settings(config, fingerprint(config.base), [method.to_dict() for method in self._methods])
        start = self._decide_start(settings, restart)
        dist.barrier()  # all have looked before one changes anything
        if start.kind == "finished":
            self._reporter.note(f"{config.output}: this training is finished already; --restart trains again")
            return TrainingResult(start.revision, start.record, was_finished=True)
        with ExitStack() as place:
            if mesh.is_first:
                place.enter_context(self._workplace.lock())
                if start.kind == "fresh":
                    self._workplace.clear()
            model, whole = self._load_model()
            tokenizer = Tokenizer(config.base)
            datasets = read_datasets(config, model, tokenizer, self._reporter)
            run = ParallelRun(config, model, tokenizer, datasets, settings, self._reporter, mesh)
            if start.kind == "resume":
                run.resume()
                self._reporter.note(f"{run.name}: going on after step {run.progress.step} of {run.num_steps}")
            self._train(run, should_stop)
            return self._write(run, whole)

    def _decide_start(self, settings: Mapping[str, Any], restart: bool) -> Start:
        state = None if restart else read_state(self._workplace.distributed)
        if state is None:
            start = self._workplace.decide_start(settings, restart=restart)
            if start.kind == "resume":
                raise ConfigError(
                    f"{self._workplace.checkpoint}: the checkpoint of a run in one process: quiver train goes on from "
                    "it; or start over with --restart"
                )
            return start
        if changed := differences(state[0], settings):
            raise ConfigError(
                f"{self._workplace.distributed}: the checkpoint of another run: {changed}. "
                "Undo the change to go on with it, or start over with --restart"
            )
        return Start("resume")

    def _load_model(self) -> tuple[AnyModel, TrainableAdapter | None]:
        """The sharded model, and a whole adapter into which the shards are gathered at the end."""
        config, mesh = self._config, self._mesh
        base = load_split_base(config.base, mesh, dtype=getattr(torch, config.dtype))
        base.recomputes = config.checkpoint_activations
        model = model_of(base)
        torch.manual_seed(config.seed)
        if self._methods:
            model.add_adapter(self._methods)
        whole = model.adapter
        if whole is not None:
            model.adapter = split_adapter(whole, base, mesh)
        what = ", ".join(section.method for section in config.adapter or ()) or "full fine-tuning"
        self._reporter.note(
            f"{config.output.name}: {what} on {config.base.name} in {dist.get_world_size()} processes "
            f"(tensor {mesh.tensor_size} x data {mesh.data_size}), {mesh.device.type}"
        )
        return model, whole

    def _train(self, run: ParallelRun, should_stop: Callable[[], bool]) -> None:
        """Train to the end. Raises TrainingError, TrainingInterrupted."""
        with self._reporter.training(run.progress.step, run.num_steps, several=False):
            run.begin()
            while not run.is_over:
                if self._any_rank(should_stop()):
                    run.save()
                    raise TrainingInterrupted(f"stopped after step {run.progress.step} of {run.num_steps}")
                run.step()
        if run.failure is not None:
            raise run.failure
        run.finish()

    def _any_rank(self, yes: bool) -> bool:
        """Whether it is true on any process."""
        flag = torch.tensor(float(yes), device=self._mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _write(self, run: ParallelRun, whole: TrainableAdapter | None) -> TrainingResult:
        """Gather the trained parameters; the first process writes them."""
        mesh, model = self._mesh, run.model
        if mesh.tensor_size > 1:
            if whole is not None and model.adapter is not None:
                model.adapter = gather_adapter(model.adapter, whole, mesh)
            else:
                gathered = gather_base(model.base, self._config.base, mesh)
                model = model_of(gathered)
            run.model, run.parameters = model, trainable(model)
        written: list[Any] = [None]
        if mesh.is_first:
            written = [write_result(run, run.tokenizer)]
            run.run_directory.remove()
        dist.broadcast_object_list(written)
        return TrainingResult(*written[0])
