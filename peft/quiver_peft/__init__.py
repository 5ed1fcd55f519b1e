"""What a base and an adapter are: GPT and T5, the adapter methods, the artefact on disk. Pure torch."""

from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig
from quiver_peft.adapters.methods.prompt import PromptTuningPEFTConfig, PtuningPEFTConfig
from quiver_peft.errors import AdapterError, BaseMismatchError, CheckpointError, QuiverError
from quiver_peft.model import GPT, T5, load_model

__all__ = [
    "GPT",
    "T5",
    "AdapterError",
    "BaseMismatchError",
    "CanonicalAdaptersPEFTConfig",
    "CheckpointError",
    "IA3PEFTConfig",
    "LoraPEFTConfig",
    "PrefixPEFTConfig",
    "PromptTuningPEFTConfig",
    "PtuningPEFTConfig",
    "QuiverError",
    "load_model",
]
