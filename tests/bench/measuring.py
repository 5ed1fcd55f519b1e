"""What both commands share: the machine's limits, the request files, running our cells, and their figures."""

import json
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.adapter_sets import adapter_ids
from bench.cells import Cell, ServerSpec
from bench.cpu_load import measured_load, resident_bytes
from bench.module_process import run_module
from bench.our_server import OurServer, running
from bench.records import Record
from bench.report import footnote, grids, save
from bench.results import CellResult, Ratio, Report, Run, run_of
from bench.roofline import Ceiling, Machine, ceiling
from bench.shapes import SHAPES
from bench.workload import read_requests, write_requests
from rich.console import Console

OURS = "quiver"


def probe_machine() -> Machine:
    """Measure the limits now."""
    return Machine(**json.loads(run_module("probe")))


def request_file(work: Path, cell: Cell, repeat: int) -> Path:
    """The cell's list of one repeat, written for everyone who is to answer it."""
    path = work / "requests" / f"{cell.name}-{cell.num_requests}x{cell.max_new_tokens}-{repeat}.json"
    write_requests(path, cell.requests(repeat))
    return path


@contextmanager
def servers(specs: Sequence[ServerSpec], work: Path, console: Console) -> Generator[dict[ServerSpec, OurServer]]:
    """Our servers, side by side: those that wait take no processor time."""
    with ExitStack() as stack:
        started: dict[ServerSpec, OurServer] = {}
        for spec in dict.fromkeys(specs):
            started[spec] = stack.enter_context(running(spec, work / "models", work / "logs"))
            console.print(f"{spec} serves after {started[spec].startup_seconds:.1f} s", highlight=False)
        yield started


def run_ours(server: OurServer, cell: Cell, requests_path: Path) -> tuple[Run, list[Record]]:
    """One repeat on our server."""
    before = server.steps()
    with measured_load() as load:
        records = server.run(read_requests(requests_path), cell.concurrency)
    after = server.steps()
    return run_of(records, load, after.count - before.count, after.seconds - before.seconds), records


def best_possible(cell: Cell, repeats: int, machine: Machine, models: Path) -> Ceiling:
    """The ceiling of all the lists of a cell."""
    folder = models / cell.server.model / cell.server.adapters
    ids = adapter_ids(cell.server.model, cell.server.adapters, cell.num_adapters)
    sizes = {name: (folder / name / "adapter_model.safetensors").stat().st_size for name in ids}
    shape = SHAPES[cell.server.model]
    runs = [ceiling(shape, machine, cell.requests(i), cell.concurrency, sizes) for i in range(repeats)]
    seconds = sum(run.seconds for run in runs)
    output = sum(run.seconds * run.output_tokens_per_second for run in runs)
    return Ceiling(seconds, output / seconds, sum(run.mean_adapter_bytes for run in runs) / repeats)


def our_result(
    cell: Cell, server: OurServer, runs: list[Run], repeats: int, machine: Machine, models: Path
) -> CellResult:
    """The cell's figures, once its runs are made."""
    best = best_possible(cell, repeats, machine, models)
    return CellResult(
        cell.name,
        OURS,
        runs,
        resident_bytes(server.pid),
        server.startup_seconds,
        best.output_tokens_per_second,
        best.mean_adapter_bytes,
    )


def paired(of: str, over: str, left: Sequence[Run], right: Sequence[Run], target: float | None) -> Ratio:
    """Throughput against throughput, run by run; pairs on a busy machine are left out while there are others."""
    pairs = list(zip(left, right, strict=True))
    quiet = [pair for pair in pairs if pair[0].clean and pair[1].clean]
    rates = [
        mine.throughput.output_tokens_per_second / theirs.throughput.output_tokens_per_second
        for mine, theirs in quiet or pairs
    ]
    return Ratio(of, over, rates, len(quiet), target)


def finish(report: Report, kind: str, folder: Path, console: Console) -> None:
    """Print the tables and write the files."""
    for grid in grids(report):
        grid.print(console)
    console.print(footnote(report), highlight=False)
    console.print(f"written: {save(report, kind, folder)}, .md and .png", highlight=False)
