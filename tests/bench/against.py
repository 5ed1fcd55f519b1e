"""`make bench-peers`: the same requests to our server and to a rival, in turns on one machine."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from bench.cells import Cell, select
from bench.measuring import OURS, finish, our_result, paired, probe_machine, request_file, run_ours, servers
from bench.our_server import OurServer, make_models
from bench.records import same_answers
from bench.results import CellResult, Report, Run
from bench.rival import Rival, export_openvino, make_environment, running_rival
from bench.rival_settings import Match, matches, settings
from bench.workload import Request, read_requests, write_requests
from rich.console import Console
from rich.progress import Progress

WORK = Path("runs/bench")
RESULTS = Path("tests/bench/results")
_WARM_TOKENS = 4
# Both sides as on a processor without AVX-512: our kernels, torch's (which the peer of vLLM looks at) and oneDNN's.
_AVX2 = {"QUIVER_KERNELS": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def warm_requests(work: Path, cell: Cell) -> Path:
    """A list that loads every adapter and fills the batch, with prompts of its own."""
    requests = [Request(r.prompt, r.adapter, _WARM_TOKENS) for r in read_requests(request_file(work, cell, -1))]
    path = work / "requests" / f"{cell.name}-warm.json"
    write_requests(path, requests)
    return path


@dataclass
class Duel:
    """A match that was played: both sides' runs, and the share of requests both answered alike."""

    match: Match
    cell: Cell
    ours: list[Run] = field(default_factory=list[Run])
    theirs: list[Run] = field(default_factory=list[Run])
    same: list[float] = field(default_factory=list[float])


def play(duel: Duel, ours: OurServer, rival: Rival, repeats: int, work: Path, progress: Progress) -> None:
    """Ours, theirs, ours, theirs, ... on the same lists."""
    cell = duel.cell
    bar = progress.add_task(f"{cell.name}: quiver and {duel.match.name}", total=repeats + 1)
    ours.warm(cell)
    rival.run(warm_requests(work, cell), cell.concurrency)
    for repeat in range(repeats):
        progress.advance(bar)
        path = request_file(work, cell, repeat)
        my_run, my_records = run_ours(ours, cell, path)
        their_run, their_records = rival.run(path, cell.concurrency)
        duel.ours.append(my_run)
        duel.theirs.append(their_run)
        duel.same.append(same_answers(my_records, their_records))
    progress.advance(bar)


def play_setup(duels: list[Duel], python: Path, repeats: int, work: Path, report: Report, console: Console) -> None:
    """The matches that share one process of the rival."""
    models = work / "models"
    first = duels[0]
    log = work / "logs" / f"{first.match.rival}-{first.cell.server.model}-{first.match.setup}.log"
    started = servers([duel.cell.server for duel in duels], work, console)
    told = settings(first.match, first.cell, models)
    with started as ours, running_rival(first.match.rival, python, told, log) as rival:
        console.print(f"{first.match.rival} ({first.match.setup}) is ready after {rival.startup_seconds:.1f} s")
        report.rival_versions[first.match.rival] = dict(rival.versions)
        with Progress(console=console) as progress:
            for duel in duels:
                server = ours[duel.cell.server]
                play(duel, server, rival, repeats, work, progress)
                add_ours(report, our_result(duel.cell, server, duel.ours, repeats, report.machine, models))
                report.cells.append(
                    CellResult(duel.cell.name, duel.match.name, duel.theirs, rival.rss_bytes, rival.startup_seconds)
                )
                ratio = paired(f"{OURS}: {duel.cell.name}", duel.match.name, duel.ours, duel.theirs, duel.match.target)
                ratio.same_answers = sum(duel.same) / len(duel.same)
                report.ratios.append(ratio)


def add_ours(report: Report, result: CellResult) -> None:
    """A cell against several rivals is one line: all our runs of it."""
    for known in report.cells:
        if (known.cell, known.engine) == (result.cell, result.engine):
            known.runs += result.runs
            return
    report.cells.append(result)


def main(
    rivals: Annotated[str, typer.Option(help="vllm, openvino, hf, with commas between; all where none is given.")] = "",
    cells: Annotated[str, typer.Option(help="Names of cells with commas between; all where none is given.")] = "",
    repeats: Annotated[int, typer.Option(help="Pairs of runs for each cell.", min=1)] = 3,
    quick: Annotated[
        bool, typer.Option(help="Few tokens, one pair: does everything work? No figures to keep.")
    ] = False,
    avx2: Annotated[
        bool, typer.Option("--avx2", help="Leave AVX-512 unused on both sides (not of OpenVINO, which cannot).")
    ] = False,
    work: Annotated[Path, typer.Option(help="Models, request lists, logs.")] = WORK,
    environments: Annotated[Path, typer.Option(help="The rivals' virtual environments.")] = WORK / "environments",
    output: Annotated[Path | None, typer.Option(help="Folder for JSON and PNG; of --quick: the work folder.")] = None,
) -> None:
    """Measure our server against rivals: both answer the same lists of requests, in turns, on one machine.

    The first time, each rival is installed into an environment of its own (gigabytes, minutes). What each is told to
    be at its best is in rival.py and peers/. The column "same answers" says how many requests both answered with the
    same tokens: all of them, but for ties that rounding decides.
    """
    console = Console()
    if avx2:
        os.environ.update(_AVX2)
    chosen = matches([name for name in rivals.split(",") if name], [name for name in cells.split(",") if name])
    by_name = {cell.name: cell for cell in select([], quick=quick)}
    duels = [Duel(match, by_name[match.cell]) for match in chosen]
    make_models(work / "models", [duel.cell.server for duel in duels])
    pythons = {name: make_environment(name, environments) for name in dict.fromkeys(match.rival for match in chosen)}
    if "openvino" in pythons:
        export_openvino(pythons["openvino"], work / "models" / "llama60")
    report = Report(" ".join(["make bench-peers", *sys.argv[1:]]), probe_machine(), quick)
    setups = dict.fromkeys((duel.match.rival, duel.match.setup, duel.cell.server.model) for duel in duels)
    for setup in setups:
        group = [d for d in duels if (d.match.rival, d.match.setup, d.cell.server.model) == setup]
        play_setup(group, pythons[setup[0]], 1 if quick else repeats, work, report, console)
    finish(report, "peers", output or (work if quick else RESULTS), console)


if __name__ == "__main__":
    typer.run(main)
