"""The tables that the demo prints."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from quiver_demo.rows import Row

Answers = Mapping[tuple[str, str], str]  # {(prompt, adapter): answer}


def answers_table(rows: Sequence[Row], adapters: Sequence[str], answers: Answers) -> Table:
    """Ticket, adapter, answer, right or wrong; the base has no task, so it is never right."""
    table = Table(show_lines=True)
    for name, width in (("ticket", 44), ("adapter", 10), ("answer", 60), ("", 6)):
        table.add_column(name, max_width=width)
    for row in rows:
        for place, adapter in enumerate(adapters):
            answer = answers[row.prompt, adapter]
            ticket = row.prompt.removesuffix("\nAnswer:") if place == 0 else ""
            table.add_row(ticket, adapter or "(base)", answer, _verdict(row, adapter, answer))
    return table


def _verdict(row: Row, adapter: str, answer: str) -> Text:
    if not adapter:
        return Text("-")
    return Text("right", "green") if answer == row.expected[adapter] else Text("wrong", "red")


def accuracy_table(rows: Sequence[Row], tasks: Sequence[str], answers: Answers) -> Table:
    """Exact match of the base alone and of each task's adapter."""
    table = Table()
    for name in ("task", "base alone", "with its adapter"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in tasks:
        shares = [
            sum(answers[row.prompt, adapter] == row.expected[task] for row in rows) / len(rows)
            for adapter in ("", task)
        ]
        table.add_row(task, *(f"{share:.0%}" for share in shares))
    return table
