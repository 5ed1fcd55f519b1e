"""`make demo`: four teams train adapters on one base; one server answers them in one batch; one joins while it runs.

Everything is the real thing: `quiver train` and `quiver serve` as processes, gRPC between them. What is trained already
is used again, so a second run takes seconds.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quiver import AsyncClient, Client
from quiver_demo.dataset import write_dataset
from quiver_demo.rows import Row, held_out_rows
from quiver_demo.tables import accuracy_table, answers_table
from quiver_peft.files.atomic_folder import replace_folder

HERE = Path("trainer/demo")
EARLY_TASKS = ("routing", "extract", "sentiment")  # served from the start
LATE_TASK = "reply"  # joins while the server is busy
TASKS = (*EARLY_TASKS, LATE_TASK)
MAX_NEW_TOKENS = 64
CONCURRENCY = 32

NEXT = r"""  make serve                                   leave the server running; then, in another terminal,
  .venv/bin/quiver adapters list               who is in memory, and how large
  .venv/bin/quiver generate --adapter routing $'Ticket from Ann Lee\nMy parcel has not come, order Q-12345.\nAnswer:'
  .venv/bin/quiver train --help                train your own"""

console = Console()


def train_all(work: Path, configs: Path) -> dict[str, Path]:
    """Train what is not trained yet, one task after the other; returns each task's adapter folder."""
    if not (work / "data").is_dir():
        write_dataset(work / "data.new")
        (work / "data.new").rename(work / "data")
    folders = {task: work / ("adapters" if task in EARLY_TASKS else "late") / task for task in TASKS}
    for task, folder in folders.items():
        console.rule(f"[bold]{task}[/]: quiver train {configs}/{task}.yaml")
        overrides = [f"output={folder}"]
        overrides += [f"data.{split}={work}/data/{task}/{split}.jsonl" for split in ("train", "validation")]
        command = [sys.executable, "-m", "quiver.cli", "train", f"{configs}/{task}.yaml", *overrides]
        subprocess.run(command, check=True)
    return folders


@contextmanager
def running_server(work: Path, base: Path) -> Generator[str]:
    """A server on a port of the system's choice; gives its address, and sees that it drains in the end."""
    log_path = work / "server.log"
    port = _free_port()
    command = [sys.executable, "-m", "quiver.cli", "serve", "--base", str(base), "--adapters", str(work / "adapters")]
    with log_path.open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port), "--metrics-port", "-1"], stderr=log, stdout=log)
    try:
        with Client(f"127.0.0.1:{port}") as client:
            started = time.monotonic()
            client.wait_until_ready(60)
            console.print(f"server ready in {time.monotonic() - started:.1f} s on port {port}, log in {log_path}")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        code = process.wait(60)
        console.print(f"server drained, exit code {code}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class DemoClient:
    """A client that sends many questions at once and counts tokens."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._places = asyncio.Semaphore(CONCURRENCY)
        self.num_tokens = 0

    async def ask(self, prompt: str, adapter: str) -> str:
        """The answer of an adapter ("" is the base), streamed as a user would see it."""
        text = ""
        async with self._places:
            async for piece in self._client.stream(prompt, adapter=adapter, max_new_tokens=MAX_NEW_TOKENS, stop=["\n"]):
                text += piece.text
                self.num_tokens += len(piece.token_ids)
        return text.strip()

    async def ask_all(self, rows: Sequence[Row], adapters: Sequence[str]) -> dict[tuple[str, str], str]:
        """{(prompt, adapter): answer}, all sent interleaved: the same ticket to the base and to each adapter."""
        questions = [(row.prompt, adapter) for row in rows for adapter in adapters]
        answers = await asyncio.gather(*(self.ask(*question) for question in questions))
        return dict(zip(questions, answers, strict=True))


async def run_demo(work: Path, address: str, late: Path, num_held_out: int) -> None:
    """The interleaved batch, the adapter that joins, and the held-out accuracy."""
    rows = held_out_rows(work / "data", TASKS, num_held_out)
    async with AsyncClient(address) as client:
        desk = DemoClient(client)
        console.rule("the same tickets to the base and to three adapters, in one batch")
        first = asyncio.create_task(desk.ask_all(rows[:3] * 4, ["", *EARLY_TASKS]))
        await asyncio.sleep(0.5)
        replace_folder(work / "adapters" / LATE_TASK, {path.name: path.read_bytes() for path in late.iterdir()})
        joined = time.monotonic()
        hot = await desk.ask_all(rows[:3], [LATE_TASK])
        seconds = time.monotonic() - joined
        answers = await first | hot
        console.print(answers_table(rows[:3], ["", *TASKS], answers))
        console.print(
            f"[bold]{LATE_TASK}[/] was put into the adapters folder while the others were streaming; "
            f"{seconds:.1f} s later it had answered. Nothing was restarted.\n"
        )
        console.rule(f"held-out accuracy on {len(rows)} tickets nobody was trained on")
        desk.num_tokens, started = 0, time.monotonic()
        answers = await desk.ask_all(rows, ["", *TASKS])
        seconds = time.monotonic() - started
        console.print(accuracy_table(rows, TASKS, answers))
        console.print(
            f"{len(answers)} requests to {len(TASKS)} adapters and the base in {seconds:.1f} s: "
            f"[bold]{desk.num_tokens / seconds:.0f} generated tokens per second[/] with {CONCURRENCY} at a time.",
            soft_wrap=True,
        )


def main(
    base: Annotated[str, typer.Option(help="The base model: llama or t5.")] = "llama",
    held_out: Annotated[int, typer.Option(help="Held-out tickets to ask about.")] = 60,
) -> None:
    """Train, serve and compare."""
    if base not in ("llama", "t5"):
        raise typer.BadParameter(f"{base!r} is none; it must be llama or t5", param_hint="--base")
    suffix = "-t5" if base == "t5" else ""
    work, base_folder, configs = Path(f"runs/demo{suffix}"), HERE / f"base{suffix}", HERE / f"configs{suffix}"
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    folders = train_all(work, configs)
    shutil.rmtree(work / "adapters" / LATE_TASK, ignore_errors=True)  # of an earlier demo: it joins anew
    with running_server(work, base_folder) as address:
        asyncio.run(run_demo(work, address, folders[LATE_TASK], held_out))
    next_steps = NEXT.replace("make serve        ", "make serve BASE=t5") if base == "t5" else NEXT
    seconds = time.monotonic() - started
    console.print(
        f"\nThe whole demo took {seconds:.0f} s. What to try next:\n{next_steps}", soft_wrap=True, highlight=False
    )


if __name__ == "__main__":
    typer.run(main)
