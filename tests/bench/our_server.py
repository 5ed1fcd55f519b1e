"""Our server as it is measured: `quiver serve` as a process with its defaults, asked over gRPC."""

import asyncio
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.cells import Cell, ServerSpec
from bench.module_process import run_module
from bench.records import Record
from bench.workload import Request
from prometheus_client.parser import text_string_to_metric_families
from support.live_server import LiveServer

from quiver import AsyncClient

_STOP_SECONDS = 60.0
_CALL_SECONDS = 600.0
_WARM_TOKENS = 4


@dataclass(frozen=True)
class Steps:
    """What the engine did in one run, by the server's own metrics."""

    count: int
    seconds: float  # spent in steps, all together


@dataclass(frozen=True)
class OurServer:
    """A running server. startup_seconds: from the start of the process until it serves."""

    spec: ServerSpec
    live: LiveServer
    startup_seconds: float

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.live.process.pid

    def warm(self, cell: Cell) -> None:
        """Load what the cell's requests need, and let every row of the batch run once, with prompts of their own."""
        requests = cell.requests(repeat=-1)
        once = list({request.adapter: request for request in requests}.values())
        short = [Request(request.prompt, request.adapter, _WARM_TOKENS) for request in (*once, *requests)]
        self.run(short, cell.concurrency)

    def run(self, requests: Sequence[Request], concurrency: int) -> list[Record]:
        """A closed loop: `concurrency` requests at any time until the list ends."""
        return asyncio.run(_closed_loop(self.live.target, requests, concurrency))

    def steps(self) -> Steps:
        """Since the server started."""
        totals: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.live.metrics_page()):
            for sample in family.samples:
                totals[sample.name] += sample.value  # pyright: ignore[reportArgumentType] - a Counter of floats
        return Steps(int(totals["quiver_step_seconds_count"]), totals["quiver_step_seconds_sum"])


async def _closed_loop(target: str, requests: Sequence[Request], concurrency: int) -> list[Record]:
    pending = iter(enumerate(requests))
    async with AsyncClient(target, timeout_seconds=_CALL_SECONDS) as client:

        async def worker() -> list[Record]:
            return [await _ask(client, index, request) for index, request in pending]

        done = await asyncio.gather(*(worker() for _ in range(concurrency)))
    return sorted((record for records in done for record in records), key=lambda record: record.index)


async def _ask(client: AsyncClient, index: int, request: Request) -> Record:
    times: list[float] = []
    ids: list[int] = []
    submitted = time.perf_counter()
    options = {"max_new_tokens": request.max_new_tokens, "ignore_eos": True}
    async for piece in client.stream(request.prompt, adapter=request.adapter, **options):  # pyright: ignore[reportArgumentType]
        ids += piece.token_ids
        times += [time.perf_counter()] * len(piece.token_ids)
        if piece.adapter is not None and piece.adapter.id != request.adapter:
            raise RuntimeError(f"asked adapter {request.adapter!r}, {piece.adapter.id!r} answered")
    if len(ids) != request.max_new_tokens:
        raise RuntimeError(f"request {index}: {len(ids)} tokens instead of {request.max_new_tokens}")
    return Record(index, len(request.prompt), submitted, tuple(times), tuple(ids))


def make_models(models: Path, specs: Sequence[ServerSpec]) -> None:
    """Make the folders that are missing, in a process of its own that takes its torch threads with it."""
    kinds: dict[str, set[str]] = {}
    for spec in specs:
        kinds.setdefault(spec.model, set()).add(spec.adapters)
    for model, wanted in kinds.items():
        if all((models / model / kind).is_dir() for kind in ("base", *wanted)):
            continue
        run_module("models", str(models), model, *sorted(wanted))


@contextmanager
def running(spec: ServerSpec, models: Path, logs: Path) -> Generator[OurServer]:
    """A server that drains at the end."""
    logs.mkdir(parents=True, exist_ok=True)
    folder = models / spec.model
    log = logs / f"{spec.model}-{spec.adapters}-{spec.slots or 'all'}.log"
    options = ("--adapter-memory-mib", str(spec.adapter_memory_mib))
    started = time.perf_counter()
    live = LiveServer(folder / "base", folder / spec.adapters, log, *options, num_threads=None)
    try:
        yield OurServer(spec, live, time.perf_counter() - started)
    finally:
        live.signal()
        live.wait(_STOP_SECONDS)
