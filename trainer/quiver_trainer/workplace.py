"""The folders of a run: what it writes in the end, where it works meanwhile, and whether it may begin.

adapters/routing               the output: appears whole, when all is done
adapters/.routing.training     meanwhile: checkpoint, live metrics.jsonl, a lock. A server passes over hidden folders.
"""

import fcntl
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quiver_peft.files.json_files import read_json
from quiver_trainer.checkpoint import read_checkpoint
from quiver_trainer.errors import ConfigError
from quiver_trainer.progress import TrainRecord, ValidationRecord, to_jsonl
from quiver_trainer.settings import differences

RECORD_FILE = "quiver.json"  # as adapters have it; its "training" tells what a folder was made of
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Start:
    """How a run begins. record, revision: of the result that is there already, where it is finished."""

    kind: Literal["fresh", "resume", "finished"]
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    revision: str = ""


class Workplace:
    """The two folders of one run."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.training")
        self.checkpoint = self.folder / "checkpoint"
        self.distributed = self.folder / "distributed"  # the checkpoint of a run over several processes
        self.metrics = self.folder / METRICS_FILE

    def decide_start(self, settings: Mapping[str, Any], *, restart: bool) -> Start:
        """What to do about what is there. Raises ConfigError rather than overwrite something else."""
        result = self._read_result()
        if restart:
            return Start("fresh")
        if self.distributed.exists():
            raise ConfigError(
                f"{self.distributed}: the checkpoint of a run over several processes. Any number of them can go on "
                "from it: torchrun --nproc-per-node 1 -m quiver_trainer; or start over with --restart"
            )
        checkpoint = read_checkpoint(self.checkpoint)
        if checkpoint is not None and not differences(checkpoint.settings, settings):
            return Start("resume")
        record = None if result is None else result["training"]
        if result is not None and record is not None and not differences(record["settings"], settings):
            return Start("finished", record, result.get("revision", ""))
        if checkpoint is not None:
            raise ConfigError(
                f"{self.checkpoint}: the checkpoint of another run: {differences(checkpoint.settings, settings)}. "
                "Undo the change to go on with it, or start over with --restart"
            )
        if record is not None:
            raise ConfigError(
                f"{self.output}: holds the result of another run: {differences(record['settings'], settings)}. "
                "Choose another output, or train again with --restart"
            )
        return Start("fresh")

    def _read_result(self) -> dict[str, Any] | None:
        """The output's record; None where there is no output. Raises ConfigError for what is not ours.

        The output is replaced as a whole in the end, so it must be.
        """
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        try:
            result = read_json(self.output / RECORD_FILE)
            _ = result["training"]["settings"].keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{self.output}: exists and is not the result of a training; choose another output"
            ) from None
        return result

    @contextmanager
    def occupied(self) -> Generator[None]:
        """Keeps other runs out. Raises ConfigError when one is at work here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.output}: another training is at work on this output; wait for it") from None
            yield

    def clear(self) -> None:
        """Forget an unfinished run."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        shutil.rmtree(self.distributed, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)

    def remove(self) -> None:
        """All is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_metrics(self, records: Sequence[TrainRecord | ValidationRecord]) -> None:
        """Begin the live metrics with what is known already."""
        self.metrics.write_text(to_jsonl(records))

    def append_metrics(self, record: TrainRecord | ValidationRecord) -> None:
        """One more line for whoever watches."""
        with self.metrics.open("a") as file:
            file.write(to_jsonl([record]))
