"""Which rival answers which of our cells, with which settings, and what is wanted of the ratio."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.adapter_sets import loras
from bench.cells import CELLS, Cell

_ALPHA_OVER_RANK = 2.0  # lora_alpha / r of the adapters that `models.py` makes


@dataclass(frozen=True)
class Match:
    """A rival and a cell. setup: which of the rival's processes; matches of one setup share it. target: of the ratio.

    note: tells two matches of one rival and cell apart.
    """

    rival: str
    cell: str
    setup: str
    target: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The engine's name in tables."""
        return f"{self.rival} {self.note}".strip()


MATCHES = (
    Match("vllm", "k1-c1", "8 slots", 3.5),
    Match("vllm", "k8-c8", "8 slots", 3.0),
    Match("vllm", "k32-c32", "32 slots", 2.5),
    Match("vllm", "k32-c32-8slots", "8 slots"),
    Match("vllm", "base-c8", "no LoRA"),
    Match("vllm", "base-c32", "no LoRA"),
    Match("vllm", "qwen-k8-c8", "8 slots", 1.0),
    Match("openvino", "base-c1", "base"),
    Match("openvino", "base-c8", "base", 1.0),
    Match("openvino", "base-c32", "base", 1.0),
    Match("openvino", "k1-c1", "one adapter", 1.0),
    Match("openvino", "base-c8", "base, u8", None, "u8 KV"),
    Match("openvino", "base-c32", "base, u8", None, "u8 KV"),
    Match("hf", "k8-c8", "8 adapters"),
    Match("hf", "k32-c32", "32 adapters"),
    Match("hf", "t5-k8-c8", "8 adapters", 3.0),
    Match("hf", "t5-k8-c8", "one by one", 3.0, "one by one"),
)


def settings(match: Match, cell: Cell, models: Path) -> Mapping[str, Any]:
    """What the rival's process is told."""
    model = models.absolute() / cell.server.model
    names = loras(cell.server.model)
    adapters = {name: str(model / "lora" / name) for name in names}
    common = {"base": str(model / "base"), "adapters": adapters}
    if match.rival == "vllm":
        slots = {"8 slots": 8, "32 slots": 32, "no LoRA": 0}[match.setup]
        return {**common, "max_loras": slots, "max_num_seqs": 32}
    if match.rival == "openvino":
        one = dict(list(adapters.items())[:1]) if match.setup == "one adapter" else {}
        kv_precision = "u8" if match.note else "f32"
        return {
            "base": str(model / "openvino"),
            "adapters": one,
            "alpha": _ALPHA_OVER_RANK,
            "kv_precision": kv_precision,
        }
    few = dict(list(adapters.items())[: cell.num_adapters])
    return {**common, "adapters": few, "mixed": match.note != "one by one"}


def matches(rivals: list[str], cells: list[str]) -> list[Match]:
    """Those of the given rivals and cells; all for an empty list. Raises ValueError for names that are none."""
    known = {match.rival for match in MATCHES}
    if unknown := sorted((set(rivals) - known) | (set(cells) - CELLS.keys())):
        raise ValueError(
            f"unknown: {', '.join(unknown)}; rivals: {', '.join(sorted(known))}; cells: {', '.join(CELLS)}"
        )
    return [m for m in MATCHES if (not rivals or m.rival in rivals) and (not cells or m.cell in cells)]
