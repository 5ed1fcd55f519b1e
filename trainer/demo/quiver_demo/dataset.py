"""Writes the support-desk data set: the same tickets for every task, each with that task's answer.

`python -m quiver_demo.dataset FOLDER [--seed N]` writes FOLDER/TASK/{train,validation,held_out}.jsonl.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from quiver_demo.answers import TASKS
from quiver_demo.tickets import Ticket, tickets

DEFAULT_SEED = 2025
DEFAULT_SIZES: dict[str, int] = {"train": 4000, "validation": 100, "held_out": 200}


def make_splits(seed: int, sizes: dict[str, int]) -> dict[str, list[Ticket]]:
    """Tickets per split. No prompt occurs twice; only held-out tickets have names and products training never shows."""
    prompts: set[str] = set()

    def fresh(source: Iterator[Ticket]) -> Iterator[Ticket]:
        for ticket in source:
            if ticket.prompt not in prompts:
                prompts.add(ticket.prompt)
                yield ticket

    splits: dict[str, list[Ticket]] = {}
    for split, size in sizes.items():
        source = tickets(Random(f"desk {seed} {split}"), with_unseen=split == "held_out")
        splits[split] = list(islice(fresh(source), size))
    return splits


def write_dataset(
    folder: Path,
    seed: int = DEFAULT_SEED,
    train: int = DEFAULT_SIZES["train"],
    validation: int = DEFAULT_SIZES["validation"],
    held_out: int = DEFAULT_SIZES["held_out"],
) -> None:
    """Writes `folder`/TASK/SPLIT.jsonl for every task, one {"id", "prompt", "completion"} a line.

    A completion begins with a space, so that prompt + completion is the text a model learns.

    Args:
        folder: made when it is missing; files of the same names are overwritten.
        seed: the same seed gives the same bytes on every machine.
        train: number of rows of each task's training file; likewise `validation` and `held_out`.

    Raises:
        ValueError: a number of rows is negative.
    """
    sizes = {"train": train, "validation": validation, "held_out": held_out}
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"{split} is {size}; the number of rows must be 0 or more")
    for split, split_tickets in make_splits(seed, sizes).items():
        for task, answer in TASKS.items():
            rows = [
                {"id": f"{split}-{number:05d}", "prompt": ticket.prompt, "completion": f" {answer(ticket)}"}
                for number, ticket in enumerate(split_tickets)
            ]
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m quiver_demo.dataset", description="Write the support-desk data set of the demo."
    )
    parser.add_argument("folder", type=Path, help="where to write TASK/SPLIT.jsonl")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="default: %(default)s")
    for split, size in DEFAULT_SIZES.items():
        parser.add_argument(
            f"--{split.replace('_', '-')}", type=int, default=size, metavar="ROWS", help="default: %(default)s"
        )
    options = parser.parse_args(arguments)
    write_dataset(options.folder, options.seed, options.train, options.validation, options.held_out)
    rows = ", ".join(f"{getattr(options, split)} {split.replace('_', '-')}" for split in DEFAULT_SIZES)
    print(f"wrote {len(TASKS)} tasks ({', '.join(TASKS)}) with {rows} rows each to {options.folder}")


if __name__ == "__main__":
    main()
