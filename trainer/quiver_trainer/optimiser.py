"""AdamW over the trainable parameters, and the learning rate of each step."""

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from quiver_trainer.config import OptimiserSection, ScheduleSection


def make_optimiser(parameters: Sequence[nn.Parameter], settings: OptimiserSection) -> AdamW:
    """AdamW with weight decay on matrices only: norms and biases have no business near zero."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one call for all parameters instead of a dozen for each.
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
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
