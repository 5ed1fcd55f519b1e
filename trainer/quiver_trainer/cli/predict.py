"""`quiver predict`: answers the prompts of a JSONL file with a base or an adapter."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quiver_peft.base.packing import pack
from quiver_peft.device import choose_device
from quiver_peft.files.atomic_file import write_atomically
from quiver_peft.model import AnyModel, load_model
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.command import command_parser, run_command
from quiver_trainer.data.jsonl import EXAMPLE, JsonlRow, read_lines
from quiver_trainer.errors import DataError
from quiver_trainer.loop.predict import is_exact_match, predict_tokens

_DESCRIPTION = """\
Write a model's greedy answers for the prompts of a JSONL file, and how many are right where completions are given.

  quiver predict --base models/demo-base --adapter adapters/routing data/routing/heldout.jsonl answers.jsonl

Each line of the input is an object with a "prompt" and, if you like, the right "completion". Each line of the output
has the "prompt", the "prediction" and, where a completion was given, that and whether it is "correct" (equal but for
white space around it).
"""


@dataclass(frozen=True)
class _Row:
    """One prompt. completion: None if the file gives none. number: its line, from 1."""

    prompt: str
    completion: str | None
    number: int

    @classmethod
    def of(cls, line: JsonlRow) -> "_Row":
        return cls(line.text("prompt"), line.text("completion") if "completion" in line.value else None, line.number)


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_command(_parser(), argv, _run)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("quiver predict", _DESCRIPTION)
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the base")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter folder; none: the base alone")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="most per answer (64)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there), cpu, cuda, cuda:1")
    parser.add_argument("input", type=Path, metavar="INPUT.jsonl", help="the prompts")
    parser.add_argument("output", type=Path, metavar="OUTPUT.jsonl", help="the answers; replaced when all are there")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above zero, not {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> None:
    rows = [_Row.of(line) for line in read_lines(options.input)]
    if not rows:
        raise DataError(f"{options.input}: holds no rows; each line must be an object such as {EXAMPLE}")
    tokenizer = Tokenizer(options.base)
    model = load_model(options.base, device=choose_device(options.device))
    if options.adapter is not None:
        model.load_adapters(options.adapter)
    model.freeze()
    if model.base.embedding.weight.is_cpu:
        pack(model.base)  # as a server does: it will not be trained any more
    prompts = [tokenizer.encode(row.prompt) for row in rows]
    _check_lengths(prompts, rows, options.input, model.max_tokens)
    answers = _predict(model, prompts, options.max_new_tokens)
    results = [_result(row, tokenizer.decode(answer)) for row, answer in zip(rows, answers, strict=True)]
    write_atomically(options.output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results).encode())
    print(f"wrote {len(results)} answers to {options.output}")
    correct = [result["correct"] for result in results if "correct" in result]
    if correct:
        print(f"exact match: {sum(correct) / len(correct):.1%} ({sum(correct)} of {len(correct)})")


def _check_lengths(prompts: Sequence[Sequence[int]], rows: Sequence[_Row], path: Path, max_tokens: int | None) -> None:
    for prompt, row in zip(prompts, rows, strict=True):
        if not prompt:
            raise DataError(f"{path}:{row.number}: the prompt has 0 tokens; there must be at least one")
        if max_tokens is not None and len(prompt) >= max_tokens:
            raise DataError(
                f"{path}:{row.number}: the prompt has {len(prompt)} tokens; there must be fewer than the {max_tokens} "
                "that the base takes, answer included"
            )


def _predict(model: AnyModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(prompts))
        return predict_tokens(
            model, prompts, max_new_tokens=max_new_tokens, on_finished=lambda _: progress.advance(task)
        )


def _result(row: _Row, prediction: str) -> dict[str, Any]:
    result: dict[str, Any] = {"prompt": row.prompt, "prediction": prediction}
    if row.completion is not None:
        result |= {"completion": row.completion, "correct": is_exact_match(prediction, row.completion)}
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
