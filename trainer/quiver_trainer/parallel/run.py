"""One run over all ranks: the run of one process, but for where gradients, measurements and checkpoints come from."""

import time
from collections.abc import Mapping, Sequence
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
from quiver_trainer.reports.progress import TrainRecord, ValidationRecord
from quiver_trainer.reports.terminal import Reporter


class ParallelRun(Run):
    """Every rank has one, and takes the same steps. parameters: this rank's shares."""

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
            self.run_directory = _ReadOnlyRunDirectory(config.output)

    def step(self) -> None:
        """Learn from the next batch, or set `failure`: on all ranks or on none."""
        started = time.perf_counter()
        samples = self.next_samples()
        loss = self._gradients.compute(samples, self.progress.step, self.loss_scale)
        batches = [collate(batch, self.model) for batch in samples]
        self.take_step(batches, loss, time.perf_counter() - started)

    def clip(self, longest: float) -> float:
        """Over the gradients of all ranks."""
        return self._gradients.clip(longest)

    def resume(self) -> None:
        """Go on from the distributed checkpoint, whose settings have been compared."""
        state = read_state(self.run_directory.distributed)
        assert state is not None
        _, self.progress = state
        restore(self.run_directory.distributed, self.parameters, self.optimizer, self._mesh, self.progress.step)

    def save(self) -> None:
        """Every rank writes what it has."""
        write_checkpoint(
            self.run_directory.distributed, self.parameters, self.optimizer, self._mesh, self.progress, self.settings
        )

    def make_validator(self, validation: Dataset, mender: SpanCorruptor | None) -> Validator:
        """Dealt over the copies of the base."""
        return ParallelValidator(self.config.evaluation, validation, mender, self.limits, self.num_steps, self._mesh)


class _ReadOnlyRunDirectory(RunDirectory):
    """Of a rank beside the one that writes."""

    def write_metrics(self, records: Sequence[TrainRecord | ValidationRecord]) -> None:
        """The first rank does."""

    def append_metrics(self, record: TrainRecord | ValidationRecord) -> None:
        """The first rank does."""
