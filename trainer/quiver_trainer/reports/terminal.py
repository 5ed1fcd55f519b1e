"""Terminal output of a run: a progress bar and a table in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from quiver_trainer.reports.progress import ValidationRecord

_PIPE_WIDTH = 200
_LINES_PER_RUN = 10


class Reporter:
    """Prints to standard output, warnings to standard error. quiet: only warnings. warns: False: no warnings either."""

    def __init__(self, *, quiet: bool = False, warns: bool = True) -> None:
        self._warns = warns
        # A pipe has no width: do not break lines to fit one.
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self._console = Console(quiet=quiet, highlight=False, markup=False, emoji=False, width=width)
        self._errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._several = False
        self._num_steps = 0
        self._first_step = 0
        self._step = 0
        self._seconds = 0.0

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        if self._warns:
            self._errors.print(f"warning: {text}", style="yellow")

    @contextmanager
    def reading(self, path: Path) -> Generator[Callable[[], None]]:
        """Show a row counter for a file. Yields a function to call after each row."""
        columns = (TextColumn("reading {task.description}"), TextColumn("{task.completed:,.0f} rows"))
        quiet = not self._console.is_terminal or self._console.quiet
        with Progress(*columns, console=self._console, disable=quiet, transient=True) as progress:
            task = progress.add_task(path.name, total=None)
            yield lambda: progress.advance(task)

    @contextmanager
    def training(self, first_step: int, num_steps: int, *, several: bool) -> Generator[None]:
        """Show a progress bar from step `first_step` to `num_steps`, summed over all runs if there are
        several."""
        self._several, self._num_steps = several, num_steps
        self._first_step, self._step, self._seconds = first_step, first_step, 0.0
        if not self._console.is_terminal or self._console.quiet:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._console) as progress:
            self._progress = progress
            self._task = progress.add_task("training", total=num_steps, completed=first_step, status="")
            try:
                yield
            finally:
                self._progress = None

    def step(self, name: str, loss: float, num_tokens: int, seconds: float) -> None:
        """Report a finished step. loss: of its batch; num_tokens, seconds: of this step alone."""
        self._step += 1
        self._seconds += seconds
        step, rate = self._step, num_tokens / max(seconds, 1e-9)
        status = f"{self._of(name)}loss {loss:.3f}  {rate:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)
        elif step % max(1, self._num_steps // _LINES_PER_RUN) == 0 or step == self._num_steps:
            left = self._seconds / (step - self._first_step) * (self._num_steps - step)
            self.note(f"step {step}/{self._num_steps}  {status}  {left:.0f} s left")

    def _of(self, name: str) -> str:
        return f"{name}  " if self._several else ""

    @contextmanager
    def validating(self) -> Generator[None]:
        """Label the progress bar as validating."""
        if self._progress is not None:
            self._progress.update(self._task, description="validating")
        yield
        if self._progress is not None:
            self._progress.update(self._task, description="training")

    def validation(self, name: str, record: ValidationRecord) -> None:
        """Print the line of a validation."""
        shares = (
            ("token accuracy", record.token_accuracy),
            ("exact match", record.exact_match),
            ("ROUGE-L", record.rouge_l),
            ("BLEU", record.bleu),
        )
        told = "".join(f"  {what} {share:.1%}" for what, share in shares if share is not None)
        self.note(f"{self._of(name)}step {record.step}  validation loss {record.validation_loss:.3f}{told}")

    def show(self, table: Table) -> None:
        """Print a prepared table."""
        self._console.print(table)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Print names and values as a table."""
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        self._console.print(table)
