"""AdamW over the trainable parameters, and the learning rate of each step."""

import math
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import AdamW

from quiver_trainer.config import OptimiserSection, ScheduleSection

# The methods that need far more than the rest, because they have so few numbers to move or move them from afar: the
# rates of the examples of Hugging Face PEFT's documentation.
DEFAULT_RATES: Mapping[str, float] = {"ptuning": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt_tuning": 3e-2}
DEFAULT_RATE = 2e-4


def peak_rate(settings: OptimiserSection, methods: Sequence[str]) -> float:
    """As set; otherwise what suits the most delicate of the methods (none: the whole base is trained)."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return min((DEFAULT_RATES.get(method, DEFAULT_RATE) for method in methods), default=DEFAULT_RATE)


def make_optimiser(parameters: Mapping[str, nn.Parameter], settings: OptimiserSection, peak: float) -> AdamW:
    """AdamW with weight decay on matrices only: norms and biases have no business near zero, nor virtual tokens, which
    are embeddings in all but name. parameters: by name."""
    decayed = {name for name, p in parameters.items() if p.ndim >= 2 and not name.endswith(".encoder.embedding")}
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    # Fused: one call for all parameters instead of a dozen for each.
    return AdamW(
        [group for group in groups if group["params"]],
        lr=peak,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleSection) -> float:
    """The rate of step `step` (from 0) of `num_steps`: a linear rise, then constant or half a cosine down to zero."""
    warmup_steps = math.ceil(schedule.warmup_fraction * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: AdamW, rate: float) -> None:
    """For the next step, in every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate
