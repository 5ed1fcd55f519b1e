"""The tables of a measurement, for the terminal and as Markdown, and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from bench.records import Percentiles
from bench.results import CellResult, Ratio, Report
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

mpl.use("Agg")


@dataclass(frozen=True)
class Grid:
    """A table: its title, the names of its columns, and its rows. Columns after the first `num_names` are numbers."""

    title: str
    names: list[str]
    rows: list[list[str]]
    num_names: int = 2

    def print(self, console: Console) -> None:
        """On a terminal."""
        table = Table(title=self.title)
        for i, name in enumerate(self.names):
            table.add_column(name, justify="left" if i < self.num_names else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table, highlight=False)

    def markdown(self) -> str:
        """As a table of a document."""
        rule = ["---" if i < self.num_names else "---:" for i in range(len(self.names))]
        lines = [" | ".join(row) for row in (self.names, rule, *self.rows)]
        return f"{self.title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def grids(report: Report) -> list[Grid]:
    """Throughput, latencies, ratios."""
    found = [_throughput(report.cells), _latencies(report.cells)]
    return [*found, _ratios(report.ratios)] if report.ratios else found


def footnote(report: Report) -> str:
    """What the tables stand on."""
    about, machine = report.about, report.machine
    return (
        f"`{report.command}` at {about['commit']}, {about['date']}; {about['cpu']}, {about['cores']} cores; limits of "
        f"this run: {machine.bytes_per_second / 1e9:.1f} GB/s read, {machine.flops / 1e9:.0f} GFLOP/s. Clean: runs in "
        "which other processes used at most 0.15 cores."
    )


def _throughput(cells: Sequence[CellResult]) -> Grid:
    names = [
        "cell",
        "engine",
        "output tok/s",
        "total tok/s",
        "of roofline",
        "excess overhead",
        "others' cores",
        "clean",
    ]
    rows = [
        [
            cell.cell,
            cell.engine,
            f"{cell.output_tokens_per_second:.1f}",
            f"{cell.total_tokens_per_second:.0f}",
            _percent(cell.roofline_fraction),
            _percent(cell.excess_overhead),
            f"{max(run.cores_others for run in cell.counted):.2f}",
            f"{cell.num_clean}/{len(cell.runs)}",
        ]
        for cell in cells
    ]
    return Grid("Throughput: closed loop, greedy, float32", names, rows)


def _latencies(cells: Sequence[CellResult]) -> Grid:
    names = ["cell", "engine", "TTFT s p50/p95/p99", "TPOT ms p50/p95/p99", "RSS MiB", "start s"]
    rows = [
        [
            cell.cell,
            cell.engine,
            _percentiles(cell.time_to_first_token, 1.0, 2),
            _percentiles(cell.time_per_output_token, 1e3, 1),
            f"{cell.rss_bytes / 2**20:.0f}",
            f"{cell.startup_seconds:.1f}",
        ]
        for cell in cells
    ]
    return Grid("Latency and memory", names, rows)


def _ratios(ratios: Sequence[Ratio]) -> Grid:
    names = ["of", "over", "median", "pairs", "target", "reached", "same answers"]
    rows = [
        [
            ratio.of,
            ratio.over,
            f"{ratio.median:.2f}",
            " ".join(f"{pair:.2f}" for pair in ratio.pairs) + ("" if ratio.num_clean else " (busy)"),
            "-" if ratio.target is None else f"{ratio.target:.2f}",
            {None: "-", True: "yes", False: "no"}[ratio.reached],
            _percent(ratio.same_answers),
        ]
        for ratio in ratios
    ]
    return Grid("Ratios of output tok/s, pair by pair", names, rows)


def step_split(cells: Sequence[CellResult]) -> Grid:
    """Where a step's time goes, as the server's metrics tell it: inside of steps, or between them."""
    rows: list[list[str]] = []
    for cell in cells:
        steps = sum(run.num_steps or 0 for run in cell.counted)
        if not steps:
            continue
        inside = sum(run.in_steps_seconds or 0.0 for run in cell.counted) / steps
        whole = sum(run.throughput.seconds for run in cell.counted) / steps
        tokens = sum(run.throughput.output_tokens_per_second * run.throughput.seconds for run in cell.counted)
        between = max(whole - inside, 0.0)
        rows.append([cell.cell, f"{steps}", f"{inside * 1e3:.2f}", f"{between * 1e3:.2f}", f"{tokens / steps:.1f}"])
    names = ["cell", "steps", "in the step ms", "between steps ms", "tokens per step"]
    return Grid("A step of the engine, means over the runs", names, rows, num_names=1)


def draw(report: Report, path: Path) -> None:
    """Bars of output tokens per second, engine beside engine, with the roofline as a line above each group."""
    names = list(dict.fromkeys(cell.cell for cell in report.cells))
    engines = list(dict.fromkeys(cell.engine for cell in report.cells))
    figure = Figure(figsize=(2.5 + 0.9 * len(names), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        bars = [cell for cell in report.cells if cell.engine == engine]
        places = [names.index(cell.cell) - 0.4 + width * (i + 0.5) for cell in bars]
        drawn = axes.bar(places, [cell.output_tokens_per_second for cell in bars], width, label=engine)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    for cell in report.cells:
        if cell.roofline:
            place = names.index(cell.cell)
            axes.hlines(cell.roofline, place - 0.42, place + 0.42, colors="black", linestyles="dotted")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel("output tokens per second")
    axes.set_title(f"{report.about['cpu']}, {report.about['cores']} cores, float32; dotted: the roofline", fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def save(report: Report, kind: str, folder: Path) -> Path:
    """JSON, Markdown and PNG, named by date and commit; returns the JSON's path."""
    path = folder / f"{kind}-{report.about['date'][:10]}-{report.about['commit']}.json"
    report.write(path)
    path.with_suffix(".md").write_text("\n".join(grid.markdown() for grid in grids(report)) + f"\n{footnote(report)}\n")
    draw(report, path.with_suffix(".png"))
    return path


def _percentiles(values: Percentiles, scale: float, digits: int) -> str:
    return " / ".join(f"{value * scale:.{digits}f}" for value in (values.p50, values.p95, values.p99))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
