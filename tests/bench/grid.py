"""`make bench`: our server over real gRPC, cell by cell, against the machine's own limits."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from bench.cells import CELLS, Cell, select
from bench.measuring import finish, our_result, paired, probe_machine, request_file, run_ours, servers
from bench.our_server import make_models
from bench.report import step_split
from bench.results import CellResult, Ratio, Report, Run
from bench.roofline import Machine, excess_overhead
from rich.console import Console
from rich.progress import Progress

WORK = Path("runs/bench")
RESULTS = Path("tests/bench/results")


def measure(cells: list[Cell], repeats: int, machine: Machine, work: Path, console: Console) -> list[CellResult]:
    """All cells of one model: all its servers side by side, the cells in turns."""
    runs: dict[str, list[Run]] = {cell.name: [] for cell in cells}
    with servers([cell.server for cell in cells], work, console) as started, Progress(console=console) as progress:
        bar = progress.add_task(cells[0].server.model, total=len(cells) * (repeats + 1))
        for cell in cells:
            progress.update(bar, description=f"{cell.name}: warming up")
            started[cell.server].warm(cell)
            progress.advance(bar)
        for repeat in range(repeats):
            for cell in cells:
                progress.update(bar, description=f"{cell.name}: run {repeat + 1} of {repeats}")
                runs[cell.name].append(run_ours(started[cell.server], cell, request_file(work, cell, repeat))[0])
                progress.advance(bar)
        models = work / "models"
        return [our_result(cell, started[cell.server], runs[cell.name], repeats, machine, models) for cell in cells]


def add_overheads(results: list[CellResult], machine: Machine) -> None:
    """Excess overhead of cells with adapters, where the bare base was measured with as many rows."""
    by_name = {result.cell: result for result in results}
    for result in results:
        cell = CELLS[result.cell]
        base = by_name.get(f"base-c{cell.concurrency}")
        if base is not None and cell.num_adapters and cell.server.model == CELLS[base.cell].server.model:
            result.excess_overhead = excess_overhead(
                result.step_seconds, base.step_seconds, result.mean_adapter_bytes, machine
            )


def ratios(results: list[CellResult]) -> list[Ratio]:
    """The comparisons within our own cells."""
    by_name = {result.cell: result for result in results}
    found: list[Ratio] = []
    for result in results:
        cell = CELLS[result.cell]
        if cell.compare in by_name:
            found.append(paired(cell.name, cell.compare, result.runs, by_name[cell.compare].runs, cell.target))
    return found


def main(
    cells: Annotated[
        str, typer.Option(help=f"Names with commas between, of {', '.join(CELLS)}; all where none is given.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Runs of each cell.", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="Few tokens, one run: does everything work? No figures to keep.")] = False,
    profile: Annotated[bool, typer.Option(help="Also say how much of the time the engine spent in steps.")] = False,
    work: Annotated[Path, typer.Option(help="Models, request lists, logs.")] = WORK,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON and PNG; of --quick: the work folder.")] = None,
) -> None:
    """Measure our server over gRPC, cell by cell, against the machine's own limits.

    Cells that are compared take turns, so that each pair of runs saw the same machine. Runs during which other
    processes used more than 0.15 cores are marked, and left out of the figures while there are clean ones. The lists
    of requests stay in the work folder.
    """
    console = Console()
    chosen = select([name for name in cells.split(",") if name], quick=quick)
    make_models(work / "models", [cell.server for cell in chosen])
    report = Report(" ".join(["make bench", *sys.argv[1:]]), probe_machine(), quick)
    for model in dict.fromkeys(cell.server.model for cell in chosen):
        group = [cell for cell in chosen if cell.server.model == model]
        report.cells += measure(group, 1 if quick else repeats, report.machine, work, console)
    add_overheads(report.cells, report.machine)
    report.ratios = ratios(report.cells)
    finish(report, "bench", output or (work if quick else RESULTS), console)
    if profile:
        step_split(report.cells).print(console)


if __name__ == "__main__":
    typer.run(main)
