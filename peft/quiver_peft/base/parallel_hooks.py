"""Hooks for tensor parallelism outside the linears: token sharding, head and loss.

On one device they are the identity, a plain linear and a plain loss. `quiver_peft.parallel` implements them for a
sharded vocabulary and for sequence parallelism.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class TensorParallelHooks(Protocol):
    """Called by a base around its layers and at its head."""

    def scatter_tokens(self, h: Tensor) -> Tensor:
        """This device's tokens of the residual stream. h: [*, D]; the identity without sequence parallelism."""
        ...

    def gather_tokens(self, h: Tensor) -> Tensor:
        """All tokens again, from all devices. -> [*, D]; the reverse of `scatter_tokens`."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [*, D], weight: this device's rows of the head -> [*, V]."""
        ...

    def cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """-log p of each target, fp32. hidden: [R, D], targets: [R] -> [R]."""
        ...


class SingleDevice:
    """The hooks of a base on one device."""

    def scatter_tokens(self, h: Tensor) -> Tensor:
        return h

    def gather_tokens(self, h: Tensor) -> Tensor:
        return h

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [*, D], weight: [V, D] -> [*, V]."""
        return F.linear(hidden, weight.to(hidden.dtype))

    def cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden: [R, D], weight: [V, D], targets: [R] -> [R]."""
        return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets, reduction="none")


SINGLE_DEVICE: TensorParallelHooks = SingleDevice()
