"""What a measurement leaves behind: the runs, what follows from them, and the machine they were made on; as JSON."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.cpu_load import Load
from bench.records import Percentiles, Record, Throughput, percentile, percentiles, throughput
from bench.roofline import Machine

SCHEMA = 1
_PACKAGES = ("quiver", "torch", "grpcio", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Run:
    """One repeat of one cell by one engine. steps, step_seconds: the server's own account; None of a rival."""

    throughput: Throughput
    time_to_first_token: Percentiles
    time_per_output_token: Percentiles
    step_seconds: float  # the median gap between tokens, which is a decode step
    first_token_seconds: list[float]  # of each request
    output_token_seconds: list[float]  # of each request, mean
    cores_ours: float
    cores_others: float
    clean: bool
    num_steps: int | None = None
    in_steps_seconds: float | None = None


def run_of(records: Sequence[Record], load: Load, num_steps: int | None = None, in_steps: float | None = None) -> Run:
    """One run from what was seen."""
    first = [record.time_to_first_token for record in records]
    each = [record.time_per_output_token for record in records]
    gap = percentile([gap for record in records for gap in record.gaps], 50)
    return Run(
        throughput(records), percentiles(first), percentiles(each), gap, first, each,
        load.ours, load.others, load.clean, num_steps, in_steps,
    )  # fmt: skip


@dataclass
class CellResult:
    """A cell's figures: medians over its clean runs (over all where none was clean), latencies over their requests.

    engine: "quiver" or a rival. roofline: the best possible output tokens per second of these request lists.
    """

    cell: str
    engine: str
    runs: list[Run]
    rss_bytes: int
    startup_seconds: float
    roofline: float | None = None
    mean_adapter_bytes: float = 0.0  # of the distinct adapters that a decode step reads
    excess_overhead: float | None = None

    @property
    def counted(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.clean] or self.runs

    @property
    def num_clean(self) -> int:
        """Runs with a quiet machine."""
        return sum(run.clean for run in self.runs)

    @property
    def output_tokens_per_second(self) -> float:
        """Median."""
        return statistics.median(run.throughput.output_tokens_per_second for run in self.counted)

    @property
    def total_tokens_per_second(self) -> float:
        """Median, prompt tokens included."""
        return statistics.median(run.throughput.total_tokens_per_second for run in self.counted)

    @property
    def time_to_first_token(self) -> Percentiles:
        """Over all requests of the runs that count."""
        return percentiles([value for run in self.counted for value in run.first_token_seconds])

    @property
    def time_per_output_token(self) -> Percentiles:
        """Over all requests of the runs that count."""
        return percentiles([value for run in self.counted for value in run.output_token_seconds])

    @property
    def step_seconds(self) -> float:
        """Median decode step as the client sees it."""
        return statistics.median(run.step_seconds for run in self.counted)

    @property
    def roofline_fraction(self) -> float | None:
        """Of the best possible throughput."""
        return self.output_tokens_per_second / self.roofline if self.roofline else None

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        derived = (
            "output_tokens_per_second",
            "total_tokens_per_second",
            "step_seconds",
            "roofline_fraction",
            "num_clean",
        )
        summary = {name: getattr(self, name) for name in derived}
        latencies = {name: asdict(getattr(self, name)) for name in ("time_to_first_token", "time_per_output_token")}
        return {**summary, **latencies, **asdict(self)}


@dataclass
class Ratio:
    """Throughput of one over another, pair by pair. target: what is wanted of the median; None: nothing is.

    num_clean: pairs with a quiet machine; where there are such, `pairs` holds only them.
    """

    of: str
    over: str
    pairs: list[float]
    num_clean: int
    target: float | None
    same_answers: float | None = None  # share of requests both answered alike

    @property
    def median(self) -> float:
        """Of the pairs."""
        return statistics.median(self.pairs)

    @property
    def reached(self) -> bool | None:
        """Whether the target is."""
        return None if self.target is None else self.median >= self.target

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        return {**asdict(self), "median": self.median, "reached": self.reached}


@dataclass
class Report:
    """Everything of one command."""

    command: str
    machine: Machine
    quick: bool = False
    cells: list[CellResult] = field(default_factory=list[CellResult])
    ratios: list[Ratio] = field(default_factory=list[Ratio])
    rival_versions: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    about: dict[str, Any] = field(default_factory=lambda: about())

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "quick": self.quick,
            **self.about,
            "limits": asdict(self.machine),
            "rival_versions": self.rival_versions,
            "cells": [cell.to_json() for cell in self.cells],
            "ratios": [ratio.to_json() for ratio in self.ratios],
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")


def about() -> dict[str, Any]:
    """Date, commit, machine and versions."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _commit() -> str:
    """Of the checkout; "-dirty" when files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
