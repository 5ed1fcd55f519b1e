"""What the demo shows: held-out rows with every task's answer, verdicts and shares."""

from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from quiver_demo.dataset import write_dataset
from quiver_demo.rows import Row, held_out_rows
from quiver_demo.tables import accuracy_table, answers_table

ROWS = [
    Row("Ticket from A\nfirst\nAnswer:", {"routing": "Billing", "sentiment": "neutral"}),
    Row("Ticket from B\nsecond\nAnswer:", {"routing": "Sales", "sentiment": "positive"}),
]
ANSWERS = {
    (ROWS[0].prompt, ""): "I will look.",
    (ROWS[1].prompt, ""): "Sales",
    (ROWS[0].prompt, "routing"): "Billing",
    (ROWS[1].prompt, "routing"): "Returns",
    (ROWS[0].prompt, "sentiment"): "neutral",
    (ROWS[1].prompt, "sentiment"): "positive",
}


def printed(table: Table, capsys: pytest.CaptureFixture[str]) -> list[str]:
    Console(width=150).print(table)
    return capsys.readouterr().out.splitlines()


def test_rows_hold_the_answer_of_every_task(tmp_path: Path) -> None:
    write_dataset(tmp_path, seed=3, train=1, validation=1, held_out=9)
    rows = held_out_rows(tmp_path, ("routing", "extract"), 4)
    assert len(rows) == 4
    assert all(row.prompt.endswith("Answer:") for row in rows)
    assert all(row.expected["extract"].startswith("order: Q-") for row in rows)
    assert all(row.expected["routing"].isalpha() for row in rows)


def test_answers_are_right_or_wrong_and_the_base_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(answers_table(ROWS, ["", "routing", "sentiment"], ANSWERS), capsys)
    verdicts = {(cells[2].strip(), cells[3].strip()): cells[4].strip() for cells in map(_cells, lines) if cells}
    assert verdicts["(base)", "I will look."] == "-"
    assert verdicts["(base)", "Sales"] == "-"
    assert verdicts["routing", "Billing"] == "right"
    assert verdicts["routing", "Returns"] == "wrong"
    assert sum("Ticket from A" in line for line in lines) == 1, "a ticket is shown once"


def test_shares_count_exact_answers_of_base_and_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(accuracy_table(ROWS, ("routing", "sentiment"), ANSWERS), capsys)
    shares = {cells[1].strip(): (cells[2].strip(), cells[3].strip()) for cells in map(_cells, lines) if cells}
    assert shares["routing"] == ("50%", "50%")
    assert shares["sentiment"] == ("0%", "100%")


def _cells(line: str) -> list[str]:
    return line.replace("┃", "│").split("│") if "│" in line or "┃" in line else []
