"""The CUDA path tried and measured: the tests marked `cuda`, then what adapters add to a decode step.

    make gpu                                                        # on a GPU, under nine minutes
    PYTHONPATH=tests python -m bench.gpu --device cpu --quick ...   # the same plumbing on a tiny model

Writes JSON after each cell; what the file holds already, for the same machine and versions, is not measured again.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from bench.gpu_step import SHAPES, Load, StepBench, wait_for
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
GIB = 2**30
WARM_UP, REPEATS = 5, 20

_LOADS = [
    Load(batch, context, ranks)
    for batch, context in ((64, 1024), (8, 1024), (1, 1024))
    for ranks in ((), (16,), (16,) * 8, (16,) * 64, (8, 16, 64) * 2 + (8, 16), (8, 16, 64) * 21 + (8,))
    if len(ranks) <= batch
]
_QUICK_LOADS = [Load(4, 20, ()), Load(4, 20, (2,)), Load(4, 20, (2, 4, 2))]


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Wall times, each from launch to the end on the device."""
    times: list[float] = []
    for index in range(WARM_UP + repeats):
        started = time.perf_counter()
        run()
        wait_for(device)
        if index >= WARM_UP:
            times.append(time.perf_counter() - started)
    return times


def read_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of a stream that is only read."""
    x = torch.ones(num_bytes // 4, device=device)
    return num_bytes / min(seconds_of(x.sum, device))


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second from the host's memory, pinned where there is a GPU."""
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / min(seconds_of(lambda: there.copy_(host, non_blocking=True), device))


def graph_of(run: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    """The step's launches as one, which leaves the device's own time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def measure(bench: StepBench, load: Load) -> dict[str, Any]:
    """One cell: seconds of a step as it is launched today, and on a GPU as a CUDA graph."""
    with torch.inference_mode():
        run = bench.forward(load)
        times = seconds_of(run, bench.device)
        cell: dict[str, Any] = {
            "step_seconds": statistics.median(times),
            "step_seconds_range": [min(times), max(times)],
            "adapter_bytes": bench.adapter_bytes(load.ranks),
            "read_bytes": bench.base_bytes + bench.kv_bytes(load) + bench.adapter_bytes(load.ranks),
        }
        if bench.device.type == "cuda":
            try:
                graph = graph_of(run)
            except RuntimeError as error:
                cell["graph_error"] = str(error)
            else:
                cell["graph_seconds"] = statistics.median(seconds_of(graph.replay, bench.device))
    return cell


def add_ratios(cells: dict[str, Any], loads: list[Load], bandwidth: float) -> None:
    """excess: (step - base step - adapter bytes / bandwidth) / base step. bandwidth_fraction: of what must be read."""
    for load in loads:
        cell = cells.get(load.name)
        base = cells.get(Load(load.batch, load.context, ()).name)
        for key in ("step", "graph"):
            if cell and base and f"{key}_seconds" in cell and f"{key}_seconds" in base:
                seconds, bare = cell[f"{key}_seconds"], base[f"{key}_seconds"]
                cell[f"{key}_excess"] = (seconds - bare - cell["adapter_bytes"] / bandwidth) / bare
                cell[f"{key}_bandwidth_fraction"] = cell["read_bytes"] / bandwidth / seconds


def describe(device: torch.device, shape: str, dtype: torch.dtype) -> dict[str, Any]:
    """Machine, versions, commit: cells are comparable only where these agree."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    return {
        "device": name,
        "host_cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": head.stdout.strip(),
        "base": shape,
        "dtype": str(dtype).removeprefix("torch."),
    }


def run_tests(paths: list[str], limit_seconds: float) -> dict[str, Any]:
    """pytest's verdict on the tests marked `cuda`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", f"--junitxml={result}", *paths]
        try:
            subprocess.run(command, cwd=ROOT, timeout=limit_seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit_seconds:g} s"}
        if not result.exists():
            return {"error": "pytest did not start"}
        suite = ElementTree.parse(result).getroot()[0]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed}


def show(report: dict[str, Any]) -> None:
    """The cells as a table."""
    table = Table(title=f"decode steps of {report['machine']['base']} on {report['machine']['device']}")
    for column in ("cell", "step ms", "excess", "of bandwidth", "graph ms", "excess", "of bandwidth"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for name, cell in report["cells"].items():
        row = [name]
        for key in ("step", "graph"):
            row.append(f"{1e3 * cell[f'{key}_seconds']:.3f}" if f"{key}_seconds" in cell else "-")
            row += [
                f"{cell[field]:.1%}" if (field := f"{key}_{kind}") in cell else "-"
                for kind in ("excess", "bandwidth_fraction")
            ]
        table.add_row(*row)
    Console().print(table)


def measure_machine(bench: StepBench, *, quick: bool) -> dict[str, Any]:
    """What the cells are compared with, and how long an adapter takes to load."""
    size, rank = (2**20, 2) if quick else (4 * GIB, 16)
    return {
        "uses_triton": bench.uses_triton,
        "read_bytes_per_second": read_bandwidth(bench.device, size),
        "host_to_device_bytes_per_second": copy_bandwidth(bench.device, size // 4),
        "adapter_load": {
            "rank": rank,
            "bytes": bench.adapter_bytes([rank]),
            "seconds": sorted(bench.load_seconds(rank) for _ in range(5)),
        },
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write, or to go on with.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu for the plumbing.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="A tiny model and three cells: whether the script works.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin no further cell after so long.")] = 200.0,
    test_seconds: Annotated[float, typer.Option(help="End the tests after so long.")] = 270.0,
    tests: Annotated[list[str] | None, typer.Option(help="Where to look for tests marked `cuda`.")] = None,
) -> None:
    """Test, measure, write, show. Ends with 1 when a test failed."""
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device}: torch {torch.__version__} finds no GPU", param_hint="--device")
    where = torch.device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    shape, loads = ("tiny", _QUICK_LOADS) if quick else ("llama-1b", _LOADS)
    machine = describe(where, shape, dtype)
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if report.get("machine") != machine:
        report = {"machine": machine, "cells": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    report["tests"] = run_tests(tests or ["tests"], test_seconds)
    started = time.monotonic()
    bench = StepBench(SHAPES[shape], dtype, where, bank_bytes=2**22 if quick else 12 * GIB)
    report |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), **measure_machine(bench, quick=quick)}
    for load in loads:
        if load.name not in report["cells"] and time.monotonic() - started < seconds:
            report["cells"][load.name] = measure(bench, load)
            add_ratios(report["cells"], loads, report["read_bytes_per_second"])
        out.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    missing = len(loads) - len(report["cells"])
    print(f"tests marked cuda: {report['tests']}")
    print(f"{out}: {len(report['cells'])} cells" + (f", {missing} not begun: run it again" if missing else ""))
    if "error" in report["tests"] or report["tests"]["failed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
