"""The names of the adapters that are measured, and the set each of our servers is given. Plain Python."""

from typing import Literal

Kind = Literal["none", "lora", "mix"]

NUM_LORAS = {"llama60": 32, "qwen05": 8, "t5-60": 8, "tiny": 4}
MIX = {method: tuple(f"{method}-{i:02d}" for i in range(4)) for method in ("lora", "ia3", "ptuning", "canonical")}


def loras(model: str) -> tuple[str, ...]:
    """The LoRA adapters that a model has."""
    return tuple(f"lora-{i:02d}" for i in range(NUM_LORAS[model]))


def adapter_ids(model: str, kind: Kind, count: int) -> tuple[str, ...]:
    """The first `count` of a set; of a mix, as many of each method as possible."""
    if kind == "mix":
        turns = [name for group in zip(*MIX.values(), strict=True) for name in group]
        return tuple(turns[:count])
    return loras(model)[:count]
