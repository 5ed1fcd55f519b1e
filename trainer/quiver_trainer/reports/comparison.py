"""Comparison report of several runs: a table and a plot of cost and quality."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from quiver_peft.files.atomic_file import write_atomically

TABLE_FILE = "comparison.md"
PICTURE_FILE = "comparison.png"
_HEADINGS = ("run", "methods", "trained", "steps", "training loss", "validation loss", "exact match", "seconds")
_COLOR = "#1f4e8c"


@dataclass(frozen=True)
class RunSummary:
    """One run. record: its training record; None if it failed."""

    name: str
    methods: str
    record: Mapping[str, Any] | None


def comparison_table(runs: Sequence[RunSummary]) -> Table:
    """The comparison as a rich table."""
    table = Table(box=box.SIMPLE_HEAD)
    for i, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for run in runs:
        table.add_row(*_cells(run))
    return table


def write_comparison(folder: Path, runs: Sequence[RunSummary]) -> None:
    """Write comparison.md and comparison.png into the folder, replacing older ones."""
    lines = [_HEADINGS, ["---", "---", *["---:"] * (len(_HEADINGS) - 2)], *(_cells(run) for run in runs)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(folder / TABLE_FILE, text.encode())
    write_atomically(folder / PICTURE_FILE, _draw(runs))


def _cells(run: RunSummary) -> list[str]:
    if run.record is None:
        return [run.name, run.methods, *["failed"] + [""] * (len(_HEADINGS) - 3)]
    record = run.record
    measured = [
        "" if record[key] is None else form.format(record[key])
        for key, form in (("train_loss", "{:.4f}"), ("validation_loss", "{:.4f}"), ("exact_match", "{:.1%}"))
    ]
    trained = f"{record['num_trainable_parameters']:,}"
    return [run.name, run.methods, trained, f"{record['steps']:,}", *measured, f"{record['seconds']:.1f}"]


def _draw(runs: Sequence[RunSummary]) -> bytes:
    """A PNG: bars of each run's loss and, if measured, exact match."""
    # Here and not above: it takes a second, and is needed once, when all is done.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("validation_loss", "Validation loss", "nats per completion token", 1.0)]
    if not any(run.record and run.record["validation_loss"] is not None for run in runs):
        panels = [("train_loss", "Training loss", "nats per completion token", 1.0)]
    if any(run.record and run.record["exact_match"] is not None for run in runs):
        panels.append(("exact_match", "Exact match", "share of validation rows (%)", 100.0))
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 1.2 + 0.35 * len(runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = [run.name for run in runs]
    for axes, (key, title, unit, factor) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        values = [factor * ((run.record or {}).get(key) or 0.0) for run in runs]
        bars = axes.barh(names, values, color=_COLOR)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(unit, fontsize=9)
        axes.margins(x=0.15)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
