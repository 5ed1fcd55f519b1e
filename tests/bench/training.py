"""How fast training is and what memory it takes, beside Hugging Face Trainer with PEFT; and many adapters at once.

    make bench-train          # or python -m bench.training [--rounds N] [--out FILE]

Sides run in turns, each measurement in a process of its own (`training_side.py`); the figures are the best of the
rounds, for both. A Llama of 60 M parameters (`shapes.py`), LoRA of rank 16 on all linears and full fine-tuning, AdamW,
fp32, 8 rows a step; and 8 LoRAs of rank 8 on the demo's Llama with 4 rows a step, at once and one after another.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from bench.models import make_base
from bench.module_process import run_module
from bench.shapes import SHAPES
from rich.console import Console

WORK = Path("runs/bench/llama60/base")
DEMO_BASE = Path("trainer/demo/base")
STEPS = {"lora": 8, "full": 6}
ROWS = 8
JOBS, JOB_ROWS, JOB_RANK, JOB_STEPS = 8, 4, 8, 40
STEPS_ALONE = 4 * JOB_STEPS  # as long on the clock as all jobs together

Side = dict[str, float]


def measure(side: str, kind: str, base: Path, steps: int, rows: int, runs: int = 1, rank: int = 16) -> Side:
    """One process."""
    arguments = [side, kind, str(base), str(steps), str(rows), str(runs), str(rank)]
    return json.loads(run_module("training_side", *arguments).splitlines()[-1])


def best(rounds: list[Side]) -> Side:
    """The fastest round; memory is the least that sufficed."""
    return {
        "tokens_per_second": max(side["tokens_per_second"] for side in rounds),
        "peak_bytes": min(side["peak_bytes"] for side in rounds),
    }


def against_hf(rounds: int, console: Console) -> dict[str, dict[str, Side]]:
    """{kind: {side: figures}}."""
    results: dict[str, dict[str, Side]] = {}
    for kind, steps in STEPS.items():
        sides: dict[str, list[Side]] = {"quiver": [], "hf": []}
        for _ in range(rounds):
            for side, found in sides.items():
                console.print(f"{kind}: {side} ...")
                found.append(measure(side, kind, WORK, steps, ROWS))
        results[kind] = {side: best(found) for side, found in sides.items()}
    return results


def many_at_once(rounds: int, console: Console) -> dict[str, Side]:
    """All jobs at once; and one job, whose rate is that of any number one after another."""
    results: dict[str, list[Side]] = {"together": [], "alone": []}
    for _ in range(rounds):
        for name, runs, steps in (("together", JOBS, JOB_STEPS), ("alone", 1, STEPS_ALONE)):
            console.print(f"{JOBS} jobs {name} ...")
            results[name].append(measure("quiver", "lora", DEMO_BASE, steps, JOB_ROWS, runs, JOB_RANK))
    return {name: best(found) for name, found in results.items()}


def table(hf: dict[str, dict[str, Side]], many: dict[str, Side]) -> str:
    """Markdown."""
    lines = [
        "| training | tokens/s | rival | ratio | peak MiB | rival's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    pairs = [(f"{kind}, against HF Trainer", sides["quiver"], sides["hf"]) for kind, sides in hf.items()]
    pairs.append((f"{JOBS} LoRAs at once, against one after another", many["together"], many["alone"]))
    for name, ours, theirs in pairs:
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        memory = [side["peak_bytes"] / 2**20 for side in (ours, theirs)]
        rates = f"{ours['tokens_per_second']:,.0f} | {theirs['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {rates} | **{ratio:.2f} x** | {memory[0]:,.0f} | {memory[1]:,.0f} |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(help="Measurements of each side.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """Measure and print a table."""
    console = Console(stderr=True)
    if not (WORK / "config.json").exists():
        console.print("making the model ...")
        make_base(SHAPES["llama60"], WORK)
    try:
        hf, many = against_hf(rounds, console), many_at_once(rounds, console)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed")
    if out is not None:
        out.write_text(json.dumps({"against_hf": hf, "many": many}, indent=2) + "\n")
    print(table(hf, many))


if __name__ == "__main__":
    typer.run(main)
