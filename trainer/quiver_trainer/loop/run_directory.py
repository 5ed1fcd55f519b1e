"""Folders of a run: its output, its working folder, and the decision how to start.

adapters/routing               the output: appears at the end, in one rename
adapters/.routing.training     while training: checkpoint, metrics.jsonl, lock. Servers ignore hidden folders.
"""

import fcntl
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quiver_peft.files.json_files import read_json
from quiver_trainer.errors import ConfigError
from quiver_trainer.loop.checkpoint import read_checkpoint
from quiver_trainer.loop.fingerprint import differences
from quiver_trainer.reports.progress import TrainRecord, ValidationRecord, to_jsonl

RECORD_FILE = "quiver.json"  # as adapters have it; its "training" tells what a folder was made of
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Start:
    """How a run starts. record, revision: of the existing result if it is finished."""

    kind: Literal["fresh", "resume", "finished"]
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    revision: str = ""


class RunDirectory:
    """The output and the working folder of a run. writes_metrics: False on ranks other than the first."""

    def __init__(self, output: Path, *, writes_metrics: bool = True) -> None:
        self.output = output
        self._writes_metrics = writes_metrics
        self.folder = output.with_name(f".{output.name}.training")
        self.checkpoint = self.folder / "checkpoint"
        self.distributed = self.folder / "distributed"  # the checkpoint of a run over several processes
        self.metrics = self.folder / METRICS_FILE

    def decide_start(self, settings: Mapping[str, Any], *, restart: bool) -> Start:
        """Whether to start, resume or return a finished result. Raises ConfigError to protect anything else."""
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
        """The output's record; None without an output. Raises ConfigError for a folder that is no training result.

        The output folder is replaced as a whole at the end.
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
    def lock(self) -> Generator[None]:
        """Lock the working folder. Raises ConfigError if another process holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.output}: another training is at work on this output; wait for it") from None
            yield

    def clear(self) -> None:
        """Delete checkpoints and metrics of an unfinished run."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        shutil.rmtree(self.distributed, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the working folder of a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_metrics(self, records: Sequence[TrainRecord | ValidationRecord]) -> None:
        """Start metrics.jsonl with the records so far."""
        if self._writes_metrics:
            self.metrics.write_text(to_jsonl(records))

    def append_metrics(self, record: TrainRecord | ValidationRecord) -> None:
        """Append a record to metrics.jsonl."""
        if self._writes_metrics:
            with self.metrics.open("a") as file:
                file.write(to_jsonl([record]))
