"""Learning-curve plot: losses, and exact match if measured."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quiver_trainer.reports.progress import Progress, TrainRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN_COLOR = "#8fb3d9"
_SMOOTH_COLOR = "#1f4e8c"
_VALIDATION_COLOR = "#d1602b"
_MATCH_COLOR = "#2e7d4f"
_GREY = "#5a6472"


def draw_learning_curve(progress: Progress, title: str, exact_match_rows: int) -> bytes:
    """The plot as PNG bytes. exact_match_rows: validation rows behind the exact match."""
    # Here and not above: it takes a second, and is needed once, when all is done.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matches = [(r.step, r.exact_match) for r in progress.validation_records if r.exact_match is not None]
    figure = Figure(figsize=(10.5 if matches else 6.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.02, ha="left")
    axes: list[Any] = list(figure.subplots(1, 2 if matches else 1, squeeze=False)[0])
    _draw_losses(axes[0], progress)
    if matches:
        _draw_matches(axes[1], matches, exact_match_rows)
    buffer = io.BytesIO()
    # Without matplotlib's version in it, the same run draws the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_losses(axes: "Axes", progress: Progress) -> None:
    train = progress.train_records
    steps = [record.step for record in train]
    axes.plot(steps, [r.train_loss for r in train], color=_TRAIN_COLOR, linewidth=1, label="training")
    axes.plot(steps, _smooth(train), color=_SMOOTH_COLOR, linewidth=2, label="training, smoothed")
    validation = [(r.step, r.validation_loss) for r in progress.validation_records]
    if validation:
        _line_with_points(axes, validation, _VALIDATION_COLOR, "validation")
        _label_last(axes, validation[-1], f"{validation[-1][1]:.3f}", _VALIDATION_COLOR)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    _style(axes, "Loss", "cross-entropy (nats per completion token)")


def _draw_matches(axes: "Axes", matches: Sequence[tuple[int, float]], num_rows: int) -> None:
    percent = [(step, 100 * share) for step, share in matches]
    _line_with_points(axes, percent, _MATCH_COLOR, "exact match")
    _label_last(axes, percent[-1], f"{percent[-1][1]:.0f} %", _MATCH_COLOR)
    axes.set_ylim(-3, 108)
    axes.set_yticks(range(0, 101, 20))
    _style(axes, "Exact match", f"share of {num_rows} validation rows (%)")


def _smooth(records: Sequence[TrainRecord]) -> list[float]:
    """Exponential moving average over about a twentieth of the run, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(records) / 20)
    smoothed: list[float] = []
    total, weight = 0.0, 0.0
    for record in records:
        total = keep * total + record.train_loss
        weight = keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _line_with_points(axes: "Axes", points: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=5, clip_on=False, label=label)


def _label_last(axes: "Axes", point: tuple[int, float], text: str, colour: str) -> None:
    axes.annotate(
        text, point, xytext=(0, 9), textcoords="offset points", ha="center", color=colour, fontweight="bold", fontsize=9
    )


def _style(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer step", color=_GREY)
    axes.set_ylabel(unit, color=_GREY)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_GREY, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b9c1cb")
