"""AdamW over the trainable parameters, and the learning rate of each step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW

from quiver_trainer.recipe.config import OptimizerSection, ScheduleSection

# The methods that need far more than the rest, because they have so few numbers to move or move them from afar: the
# rates of the examples of Hugging Face PEFT's documentation.
DEFAULT_RATES: Mapping[str, float] = {"ptuning": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt_tuning": 3e-2}
DEFAULT_RATE = 2e-4


def peak_rate(settings: OptimizerSection, method: str) -> float:
    """The configured learning rate, or the method's default. "": full fine-tuning."""
    given = settings.learning_rate
    if isinstance(given, dict):
        given = given.get(method)
    return DEFAULT_RATES.get(method, DEFAULT_RATE) if given is None else given


def peak_rates(
    parameters: Iterable[str], settings: OptimizerSection, methods: Sequence[str] | None
) -> dict[str, float]:
    """The learning rate of each parameter, by name. methods: of the adapter, in order of application; None:
    full fine-tuning."""
    if methods is None:
        return {name: peak_rate(settings, "") for name in parameters}
    return {name: peak_rate(settings, methods[int(name.split(".")[2])]) for name in parameters}  # adapter.methods.0...


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerSection, peaks: Mapping[str, float]
) -> AdamW:
    """AdamW with weight decay on matrices only: norms, biases and IA3's scales have no business near zero, nor have
    virtual tokens, which are embeddings in all but name. parameters and their peak rates: by name."""
    groups: list[dict[str, Any]] = []
    for peak in sorted(set(peaks.values())):
        own = {name: parameter for name, parameter in parameters.items() if peaks[name] == peak}
        decayed = {name for name, p in own.items() if p.ndim >= 2 and not name.endswith(".encoder.embedding")}
        for names, decay in ((decayed, settings.weight_decay), (own.keys() - decayed, 0.0)):
            group = [parameter for name, parameter in own.items() if name in names]
            groups.append({"params": group, "weight_decay": decay, "lr": peak, "peak": peak})
    # Fused: one call for all parameters instead of a dozen for each.
    return AdamW([g for g in groups if g["params"]], betas=settings.betas, eps=settings.epsilon, fused=True)


def rate_factor(step: int, num_steps: int, schedule: ScheduleSection) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`, as a share of the peak.

    Linear warm-up, then constant, cosine or linear decay to `final_fraction`.
    """
    warmup_steps = math.ceil(schedule.warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * left


def set_learning_rate(optimizer: AdamW, factor: float) -> float:
    """Set the rate of every group to this share of its peak; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return max(group["lr"] for group in optimizer.param_groups)
