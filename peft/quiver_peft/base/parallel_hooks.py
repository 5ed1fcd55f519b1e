"""How a base lies over devices, as far as its definition must know: what happens outside of its linears.

On one device that is nothing. `quiver_peft.parallel` cuts the vocabulary, and the tokens between the linears.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class TensorParallelHooks(Protocol):
    """What a base asks for around its layers and at its head."""

    def scatter_tokens(self, h: Tensor) -> Tensor:
        """What of the residual stream this device keeps. h: [*, D]."""
        ...

    def gather_tokens(self, h: Tensor) -> Tensor:
        """The whole of it again. -> [*, D]."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [*, D], weight: of the head, as this device has it -> [*, V]."""
        ...

    def cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """-log p of each target, fp32. hidden: [R, D], targets: [R] -> [R]."""
        ...


class SingleDevice:
    """Everything is here."""

    def scatter_tokens(self, h: Tensor) -> Tensor:
        """All of it."""
        return h

    def gather_tokens(self, h: Tensor) -> Tensor:
        """It was never split."""
        return h

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [*, D], weight: [V, D] -> [*, V]."""
        return F.linear(hidden, weight)

    def cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden: [R, D], weight: [V, D], targets: [R] -> [R]."""
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


SINGLE_DEVICE: TensorParallelHooks = SingleDevice()
