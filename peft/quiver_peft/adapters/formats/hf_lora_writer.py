"""LoRA written as Hugging Face PEFT writes it, so that any tool of theirs reads it."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from quiver_peft.adapters.formats.hf_common import PREFIX, shortest_names
from quiver_peft.adapters.methods.lora import LoraPEFTConfig, LoraWeights
from quiver_peft.adapters.methods.targets import module_targets
from quiver_peft.base.base import Base


def write_hf_lora(
    base: Base, config: LoraPEFTConfig, weights: Sequence[LoraWeights], base_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and its tensors. A fused target writes its A once for each module of the checkpoint."""
    modules = module_targets(base)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for item in weights:
        start, end = item.target.rows
        for module, target in modules.items():
            inside = start <= target.rows[0] and target.rows[1] <= end
            if target.site != item.target.site or not inside:
                continue
            b = item.b[target.rows[0] - start : target.rows[1] - start]
            # Cloned: safetensors refuses two names for one memory.
            tensors[f"{PREFIX}{module}.lora_A.weight"] = item.a.clone()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.clone()
            if item.magnitude is not None:
                rows = item.magnitude[target.rows[0] - start : target.rows[1] - start]
                tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = rows.clone()
            ranks[module], alphas[module] = item.a.shape[0], item.alpha
    rank, alpha = max(ranks.values()), max(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": base.hf_task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.adapter_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": base.config.family == "gpt2",
        "target_modules": shortest_names(list(ranks), list(modules)),
        "rank_pattern": {re.escape(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(module): a for module, a in alphas.items() if a != alpha},
    }, tensors
