"""A distributed `Run`: overrides gradients, validation and checkpoints."""

import time
from collections.abc import Mapping
from typing import Any

from quiver_peft.model import AnyModel
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import collate
from quiver_trainer.data.dataset import Dataset
from quiver_trainer.data.span_corruption import SpanCorruptor
from quiver_trainer.loop.run import Run
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.loop.validation import Validator
from quiver_trainer.parallel.checkpoint import DistributedBest, read_state, restore, write_checkpoint
from quiver_trainer.parallel.gradients import Gradients
from quiver_trainer.parallel.measure import ParallelValidator
from quiver_trainer.recipe.config import TrainConfig
from quiver_trainer.reports.terminal import Reporter


class ParallelRun(Run):
    """The run on one rank; all ranks take the same steps. parameters: this rank's shards."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        tokenizer: Tokenizer,
        datasets: Mapping[str, Dataset],
        settings: Mapping[str, Any],
        reporter: Reporter,
        mesh: Mesh,
    ) -> None:
        self._mesh = mesh
        if not mesh.is_first:
            config = config.model_copy(update={"tensorboard": None})
        super().__init__(config, model, tokenizer, datasets, settings, reporter)
        self._gradients = Gradients(model, mesh, self.parameters, config.seed)
        self.best = DistributedBest(self.run_directory.folder / "best", mesh)
        if not mesh.is_first:
            self.run_directory = RunDirectory(config.output, writes_metrics=False)

    def step(self) -> None:
        """Train on the next batch, or set `failure`, on all ranks alike."""
        started = time.perf_counter()
        samples = self.next_samples()
        loss = self._gradients.compute(samples, self.progress.step, self.loss_scale)
        batches = [collate(batch, self.model) for batch in samples]
        self.take_step(batches, loss, time.perf_counter() - started)

    def clip(self, longest: float) -> float:
        """Clip the norm over the gradients of all ranks."""
        return self._gradients.clip(longest)

    def resume(self) -> None:
        """Resume from the distributed checkpoint, whose settings have been compared."""
        state = read_state(self.run_directory.distributed)
        assert state is not None
        _, self.progress = state
        restore(self.run_directory.distributed, self.parameters, self.optimizer, self._mesh, self.progress.step)

    def save(self) -> None:
        """Write the distributed checkpoint, each rank its shards."""
        write_checkpoint(
            self.run_directory.distributed, self.parameters, self.optimizer, self._mesh, self.progress, self.settings
        )

    def make_validator(self, validation: Dataset, mender: SpanCorruptor | None) -> Validator:
        """A validator that shards samples over the data-parallel group."""
        return ParallelValidator(self.config.evaluation, validation, mender, self.limits, self.num_steps, self._mesh)
