"""The held-out tickets of the demo with every task's right answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One ticket. expected: {task: the right answer}."""

    prompt: str
    expected: dict[str, str]


def held_out_rows(data: Path, tasks: Sequence[str], count: int) -> list[Row]:
    """The first `count` held-out tickets; every task's file holds the same ones in the same order."""
    files = {task: (data / task / "held_out.jsonl").read_text("utf-8").splitlines()[:count] for task in tasks}
    rows: list[Row] = []
    for lines in zip(*files.values(), strict=True):
        records = [json.loads(line) for line in lines]
        expected = {task: record["completion"].strip() for task, record in zip(files, records, strict=True)}
        rows.append(Row(records[0]["prompt"], expected))
    return rows
