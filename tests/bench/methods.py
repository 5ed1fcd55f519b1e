"""Every method on the support desk's data: time to train, size, how often it is right, what serving it costs.

    python tests/bench/methods.py --base trainer/demo/base --work runs/methods

Trains each trial on one task with the demo's data, measures it on held-out tickets, then serves all of them and
compares the time of a batch through each adapter with the same batch through the base, in turns. Prints a Markdown
table and writes it with machine and versions as JSON. Trials that are trained already are not trained again.
"""

import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from quiver import AsyncClient
from quiver_peft.model import load_model
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import TrainConfig, Trainer
from quiver_trainer.data import read_dataset
from quiver_trainer.demo.desk import write_dataset
from quiver_trainer.demo.story import running_server
from quiver_trainer.evaluate import exact_match

ROWS = 32
TOKENS = 48
ROUNDS = 5

_LORA: dict[str, Any] = {"method": "lora", "adapter_dim": 16, "alpha": 32.0, "target_modules": ["all"]}
_PTUNING: dict[str, Any] = {"method": "ptuning", "virtual_tokens": 20, "bottleneck_dim": 192, "embedding_dim": 192}
_CANONICAL: dict[str, Any] = {"method": "canonical", "adapter_dim": 32}
_IA3: dict[str, Any] = {"method": "ia3"}


@dataclass(frozen=True)
class Trial:
    """An adapter to train and how. On a T5 steps and rates may be others."""

    adapter: list[dict[str, Any]]
    learning_rate: float
    max_steps: int


TRIALS = {
    "lora": Trial([_LORA], 3e-3, 180),
    "dora": Trial([{**_LORA, "use_dora": True}], 3e-3, 180),
    "ia3": Trial([_IA3], 1e-1, 400),
    "canonical": Trial([_CANONICAL], 3e-3, 240),
    "ptuning": Trial([_PTUNING], 3e-3, 500),
    "prompt-tuning": Trial([{"method": "prompt_tuning", "virtual_tokens": 20}], 3e-2, 500),
    "prefix": Trial([{"method": "prefix", "virtual_tokens": 20}], 3e-2, 400),
    "lora-ia3": Trial([_LORA, _IA3], 3e-3, 180),
    "ptuning-canonical": Trial([_PTUNING, _CANONICAL], 3e-3, 240),
}


@dataclass
class Result:
    """One line of the table. overhead: time of a batch through the adapter over that through the base, less one."""

    method: str
    num_parameters: int
    artefact_bytes: int
    train_seconds: float
    accuracy: float
    steps: int
    learning_rate: float
    overhead: float = float("nan")


def train(name: str, trial: Trial, task: str, base: Path, work: Path) -> Result:
    """Train unless it was, and measure on held-out tickets."""
    output = work / "adapters" / name
    settings = {
        "base": str(base),
        "output": str(output),
        "adapter": trial.adapter,
        "data": {"train": str(work / "data" / task / "train.jsonl")},
        "epochs": 100,
        "max_steps": trial.max_steps,
        "batch_size": 16,
        "optimiser": {"learning_rate": trial.learning_rate, "weight_decay": 0.0},
        "seed": 1,
    }
    config = TrainConfig.model_validate_json(json.dumps(settings), strict=True)
    assert config.adapter is not None
    model = load_model(base)
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)
    record = json.loads((output / "quiver.json").read_text())["training"]
    served = load_model(base)
    served.load_adapters(output)
    served.freeze()
    tokenizer = Tokenizer(base)
    eos = served.base.config.eos_token_ids[0]
    path = work / "data" / task / "held_out.jsonl"
    held_out = read_dataset(path, tokenizer, eos=eos, max_length=None, skip_too_long=False)
    size = sum((output / file).stat().st_size for file in ("adapter_config.json", "adapter_model.safetensors"))
    accuracy = exact_match(served, tokenizer, held_out.samples, None)
    return Result(
        name,
        record["num_trainable_parameters"],
        size,
        record["seconds"],
        accuracy,
        trial.max_steps,
        trial.learning_rate,
    )


async def batch_seconds(client: AsyncClient, prompts: list[str], adapter: str) -> float:
    """One batch of equally long answers."""
    started = time.perf_counter()
    calls = [client.generate(prompt, adapter=adapter, max_new_tokens=TOKENS, ignore_eos=True) for prompt in prompts]
    answers = await asyncio.gather(*calls)
    assert all(len(answer.candidates[0].token_ids) == TOKENS for answer in answers)
    return time.perf_counter() - started


async def serve_overheads(address: str, names: list[str], prompts: list[str]) -> dict[str, float]:
    """For each adapter, the median over rounds of its batch's time over that of the base just before."""
    ratios: dict[str, list[float]] = {name: [] for name in names}
    async with AsyncClient(address) as client:
        for name in ("", *names):
            await batch_seconds(client, prompts, name)  # loads it
        for _ in range(ROUNDS):
            for name in names:
                alone = await batch_seconds(client, prompts, "")
                ratios[name].append(await batch_seconds(client, prompts, name) / alone)
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}


def markdown(results: list[Result]) -> str:
    """The table."""
    lines = [
        "| method | trained parameters | artefact | training | steps, rate | held out | serving, over the base |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r.method} | {r.num_parameters:,} | {r.artefact_bytes / 1024:,.0f} KiB | {r.train_seconds:.0f} s | "
            f"{r.steps}, {r.learning_rate:g} | {r.accuracy:.1%} | {r.overhead:+.0%} |"
        )
    return "\n".join(lines)


def main(
    base: Annotated[Path, typer.Option(help="The base to train on.")] = Path("trainer/demo/base"),
    work: Annotated[Path, typer.Option(help="Where adapters, data and the result go.")] = Path("runs/methods"),
    task: Annotated[str, typer.Option(help="Which of the support desk's tasks.")] = "sentiment",
    only: Annotated[list[str] | None, typer.Option(help="Names of trials; all where none is given.")] = None,
) -> None:
    """Train, measure, serve, compare."""
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data").is_dir():
        write_dataset(work / "data")
    results: list[Result] = []
    for name in only or TRIALS:
        results.append(train(name, TRIALS[name], task, base, work))
        console.print(f"{name}: {results[-1].accuracy:.1%} right after {results[-1].train_seconds:.0f} s")
    rows = (work / "data" / task / "held_out.jsonl").read_text("utf-8").splitlines()[:ROWS]
    prompts = [json.loads(row)["prompt"] for row in rows]
    with running_server(work, base) as address:
        overheads = asyncio.run(serve_overheads(address, [result.method for result in results], prompts))
    for result in results:
        result.overhead = overheads[result.method]
    console.print(markdown(results), soft_wrap=True, highlight=False)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "base": base.name,
        "task": task,
        "rows": ROWS,
        "tokens": TOKENS,
    }
    text = json.dumps({**about, "results": [asdict(result) for result in results]}, indent=2)
    (work / "methods.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
