"""Every method on the support desk's data: time to train, size, how often it is right, what serving it costs.

    python tests/bench/methods.py train --base trainer/demo/base
    python tests/bench/methods.py serve --base trainer/demo/base

`train` trains each method on one task with the demo's data and measures it on held-out tickets; what is trained already
is only measured. `serve` serves all that are trained and compares the time of a batch through each adapter
with the same batch through the base, in turns: it needs a quiet machine. Both write what they know, with machine and
versions, into one JSON file, and print it as a Markdown table.
"""

import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from quiver import AsyncClient
from quiver_demo.dataset import DEFAULT_SIZES, write_dataset
from quiver_demo.run_demo import running_server
from quiver_peft.model import T5, load_model
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import TrainConfig, Trainer
from quiver_trainer.data.dataset import read_dataset
from quiver_trainer.data.jsonl import Encoder
from quiver_trainer.loop.metrics import exact_match

RESULTS = Path("tests/bench/results")
ROWS = 32
TOKENS = 48
ROUNDS = 5

_LORA: dict[str, Any] = {"method": "lora", "adapter_dim": 16, "alpha": 32.0, "target_modules": ["all"]}
_PTUNING: dict[str, Any] = {"method": "ptuning", "virtual_tokens": 20, "bottleneck_dim": 192, "embedding_dim": 192}
_CANONICAL: dict[str, Any] = {"method": "canonical", "adapter_dim": 32}
_IA3: dict[str, Any] = {"method": "ia3"}


METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [_LORA],
    "dora": [{**_LORA, "use_dora": True}],
    "ia3": [_IA3],
    "canonical": [_CANONICAL],
    "ptuning": [_PTUNING],
    "prompt-tuning": [{"method": "prompt_tuning", "virtual_tokens": 20}],
    "prefix": [{"method": "prefix", "virtual_tokens": 20}],
    "lora-ia3": [_LORA, _IA3],
    "ptuning-canonical": [_PTUNING, _CANONICAL],
}


@dataclass(frozen=True)
class Run:
    """How an adapter is trained; all in batches of 16 rows, without weight decay."""

    learning_rate: float
    max_steps: int


RUNS: dict[str, dict[str, Run]] = {
    "gpt": {
        "lora": Run(3e-3, 80),
        "dora": Run(3e-3, 80),
        "ia3": Run(5e-2, 120),
        "canonical": Run(3e-3, 100),
        "ptuning": Run(1e-2, 120),
        "prompt-tuning": Run(1e-1, 120),
        "prefix": Run(5e-2, 120),
        "lora-ia3": Run(3e-3, 80),
        "ptuning-canonical": Run(3e-3, 100),
    },
    "t5": {
        "lora": Run(3e-3, 120),
        "dora": Run(3e-3, 120),
        "ia3": Run(3e-2, 160),
        "canonical": Run(3e-3, 120),
        "ptuning": Run(3e-3, 160),
        "prompt-tuning": Run(2e-2, 160),
        "prefix": Run(5e-2, 160),
        "lora-ia3": Run(3e-3, 120),
        "ptuning-canonical": Run(3e-3, 120),
    },
}


@dataclass(frozen=True)
class Result:
    """One line of the table. overhead: time of a batch through the adapter over that through the base, less one; None
    until it is measured."""

    method: str
    num_parameters: int
    artefact_bytes: int
    train_seconds: float
    accuracy: float
    steps: int
    learning_rate: float
    overhead: float | None = None


def train_one(name: str, task: str, base: Path, work: Path) -> Result:
    """Train unless it was, and measure on held-out tickets."""
    model = load_model(base)
    run = RUNS["t5" if isinstance(model, T5) else "gpt"][name]
    output = work / "adapters" / name
    settings = {
        "base": str(base),
        "output": str(output),
        "adapter": METHODS[name],
        "data": {"train": str(work / "data" / task / "train.jsonl")},
        "epochs": 100,
        "max_steps": run.max_steps,
        "batch_size": 16,
        "optimizer": {"learning_rate": run.learning_rate, "weight_decay": 0.0},
        "seed": 1,
    }
    config = TrainConfig.model_validate_json(json.dumps(settings), strict=True)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)
    record = json.loads((output / "quiver.json").read_text())["training"]
    served = load_model(base)
    served.load_adapters(output)
    served.freeze()
    tokenizer = Tokenizer(base)
    eos = served.base.config.eos_token_ids[0]
    path = work / "data" / task / "held_out.jsonl"
    held_out = read_dataset(path, Encoder(tokenizer, eos, served.base.config.vocab_size, None))
    size = sum((output / file).stat().st_size for file in ("adapter_config.json", "adapter_model.safetensors"))
    accuracy = exact_match(served, tokenizer, held_out, None)
    num_parameters, seconds = record["num_trainable_parameters"], record["seconds"]
    return Result(name, num_parameters, size, seconds, accuracy, run.max_steps, run.learning_rate)


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


def markdown(results: list[Result], base: str) -> str:
    """The table of one base."""
    lines = [
        f"| method on {base} | trained parameters | artefact | steps, rate | training | held out | serving |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        overhead = "not measured" if r.overhead is None else f"{r.overhead:+.0%}"
        lines.append(
            f"| {r.method} | {r.num_parameters:,} | {r.artefact_bytes / 1024:,.0f} KiB | {r.steps}, "
            f"{r.learning_rate:g} | {r.train_seconds:.0f} s | {r.accuracy:.1%} | {overhead} |"
        )
    return "\n".join(lines)


def read_results(path: Path) -> list[Result]:
    """What is known so far."""
    return [Result(**line) for line in json.loads(path.read_text())["results"]] if path.exists() else []


def write_results(path: Path, base: Path, task: str, results: list[Result]) -> None:
    """As JSON beside where and with what they were measured, and as a table on the terminal."""
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "base": base.name,
        "task": task,
        "held_out": DEFAULT_SIZES["held_out"],
        "serving": f"{ROWS} requests at a time of {TOKENS} tokens each, median of {ROUNDS} rounds",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": [asdict(result) for result in results]}, indent=2) + "\n")
    Console().print(markdown(results, base.name), soft_wrap=True, highlight=False)


def _processor() -> str:
    """The name of the CPU, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Base = Annotated[Path, typer.Option(help="The base to train on.")]
Work = Annotated[Path | None, typer.Option(help="Where adapters and data go; unset: runs/methods-BASE.")]
Task = Annotated[str, typer.Option(help="Which of the support desk's tasks.")]


@app.command()
def train(
    base: Base = Path("trainer/demo/base"),
    work: Work = None,
    task: Task = "extract",
    only: Annotated[list[str] | None, typer.Option(help="Names of methods; all where none is given.")] = None,
) -> None:
    """Train and measure on held-out tickets."""
    work = work or Path("runs") / f"methods-{base.name}"
    if not (work / "data").is_dir():
        write_dataset(work / "data")
    path = RESULTS / f"methods-{base.name}.json"
    known = {result.method: result for result in read_results(path)}
    for name in only or METHODS:
        known[name] = train_one(name, task, base, work)
        results = [known[name] for name in METHODS if name in known]
        write_results(path, base, task, results)


@app.command()
def serve(base: Base = Path("trainer/demo/base"), work: Work = None, task: Task = "extract") -> None:
    """Serve what `train` has trained, and add what it costs."""
    work = work or Path("runs") / f"methods-{base.name}"
    path = RESULTS / f"methods-{base.name}.json"
    results = read_results(path)
    rows = (work / "data" / task / "held_out.jsonl").read_text("utf-8").splitlines()[:ROWS]
    prompts = [json.loads(row)["prompt"] for row in rows]
    with running_server(work, base) as address:
        overheads = asyncio.run(serve_overheads(address, [result.method for result in results], prompts))
    write_results(path, base, task, [replace(result, overhead=overheads[result.method]) for result in results])


if __name__ == "__main__":
    app()
