"""A step's integers on their way to the device: gathered first, then sent together."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


class PinnedUpload:
    """One copy of int32 numbers, from pinned memory where the device is a GPU, so that nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[np.ndarray] = []
        self._views: list[Tensor] = []

    def add(self, numbers: Sequence[int] | np.ndarray) -> Callable[[], Tensor]:
        """Returns what gives these numbers on the device, [n] int32, once they have been sent."""
        index = len(self._parts)
        self._parts.append(np.asarray(numbers, np.int32))
        return lambda: self._views[index]

    def send(self) -> None:
        """Everything that was added. Once."""
        packed = torch.from_numpy(np.concatenate(self._parts))
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        there = packed.to(self.device, non_blocking=True)
        ends = np.cumsum([0, *map(len, self._parts)]).tolist()
        self._views = [there[start:end] for start, end in pairwise(ends)]
