"""The configurations an adapter may be made of, and the fixed order in which its methods act."""

from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig
from quiver_peft.adapters.methods.prompt import PromptTuningPEFTConfig, PtuningPEFTConfig

PEFTConfig = (
    PrefixPEFTConfig
    | PtuningPEFTConfig
    | PromptTuningPEFTConfig
    | LoraPEFTConfig
    | IA3PEFTConfig
    | CanonicalAdaptersPEFTConfig
)

# Virtual tokens of a prefix stand before those of a prompt; DoRA's gate (of LoRA) comes before IA3's scale.
METHOD_ORDER = ("prefix", "ptuning", "prompt_tuning", "lora", "ia3", "canonical")


def method_name(config: PEFTConfig) -> str:
    """The method of a configuration, as `quiver.json` and the wire say it."""
    return str(config.to_dict()["method"])
