"""The grid: what is measured, on which of our servers, with how many requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.adapter_sets import Kind, adapter_ids
from bench.shapes import SHAPES
from bench.workload import Request, make_requests

from quiver_peft.rounding import ceil_div

_MIB = 2**20


@dataclass(frozen=True)
class ServerSpec:
    """One of our servers. adapters: its folder; slots: adapter memory for this many LoRAs, None for all of them."""

    model: str
    adapters: Kind
    slots: int | None = None

    @property
    def adapter_memory_mib(self) -> int:
        """What --adapter-memory-mib says: never room for one more than asked for."""
        adapter_bytes = SHAPES[self.model].adapter_bytes
        if self.slots is None:
            return 64 + 33 * adapter_bytes // _MIB
        return ceil_div(self.slots * adapter_bytes, _MIB)


@dataclass(frozen=True)
class Cell:
    """One measurement. num_adapters: 0 asks for the base alone.

    compare, target: another cell of the same run, and the share of its throughput that is wanted of this one.
    """

    name: str
    server: ServerSpec
    num_adapters: int
    concurrency: int
    num_requests: int
    max_new_tokens: int = 64
    compare: str | None = None
    target: float | None = None

    def requests(self, repeat: int) -> list[Request]:
        """The list of one repeat. Cells that are compared answer the same prompts, on servers of their own."""
        shape = SHAPES[self.server.model]
        adapters = adapter_ids(self.server.model, self.server.adapters, self.num_adapters)
        seed = f"{self.server.model}/{self.num_adapters}/{self.concurrency}/{repeat}"
        return make_requests(seed, self.num_requests, adapters, shape.vocab_size, self.max_new_tokens)


_BARE = ServerSpec("llama60", "none")
_LORA = ServerSpec("llama60", "lora")

CELLS = {
    cell.name: cell
    for cell in (
        Cell("base-c1", _BARE, 0, 1, 3),
        Cell("enabled-c1", _LORA, 0, 1, 3, compare="base-c1", target=0.98),
        Cell("base-c8", _BARE, 0, 8, 16),
        Cell("enabled-c8", _LORA, 0, 8, 16, compare="base-c8", target=0.98),
        Cell("base-c32", _BARE, 0, 32, 32),
        Cell("enabled-c32", _LORA, 0, 32, 32, compare="base-c32", target=0.98),
        Cell("k1-c1", _LORA, 1, 1, 3),
        Cell("k8-c8", _LORA, 8, 8, 16),
        Cell("k32-c32", _LORA, 32, 32, 32),
        Cell("k32-c32-8slots", ServerSpec("llama60", "lora", slots=8), 32, 32, 32, compare="k32-c32", target=0.85),
        Cell("k16-c16", _LORA, 16, 16, 32),
        Cell("mix16-c16", ServerSpec("llama60", "mix"), 16, 16, 32, compare="k16-c16", target=0.85),
        Cell("t5-k8-c8", ServerSpec("t5-60", "lora"), 8, 8, 16),
        Cell("qwen-k8-c8", ServerSpec("qwen05", "lora"), 8, 8, 8, max_new_tokens=32),
    )
}


def select(names: Sequence[str], *, quick: bool = False) -> list[Cell]:
    """Cells by name, in the grid's order; all for no names. quick: a quarter of the tokens and half the requests.

    Raises ValueError for a name that is none.
    """
    unknown = sorted(set(names) - CELLS.keys())
    if unknown:
        raise ValueError(f"no cell {', '.join(unknown)}; there are {', '.join(CELLS)}")
    chosen = [cell for name, cell in CELLS.items() if not names or name in names]
    if not quick:
        return chosen
    return [replace(cell, num_requests=max(cell.num_requests // 2, 1), max_new_tokens=16) for cell in chosen]
