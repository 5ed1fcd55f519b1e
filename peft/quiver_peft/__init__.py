"""What a base and an adapter are: GPT and (later) T5, the adapter methods, the artefact on disk. Pure torch."""

from quiver_peft.adapters.lora import LoraPEFTConfig
from quiver_peft.errors import AdapterError, BaseMismatchError, CheckpointError, QuiverError
from quiver_peft.model import GPT

__all__ = [
    "GPT",
    "AdapterError",
    "BaseMismatchError",
    "CheckpointError",
    "LoraPEFTConfig",
    "QuiverError",
]
