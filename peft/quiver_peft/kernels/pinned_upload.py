"""`PinnedUpload`: copies all of a step's integers to the device at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


class PinnedUpload:
    """Collects int32 arrays and copies them in one transfer; to a GPU from pinned memory, without synchronizing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[np.ndarray] = []
        self._views: list[Tensor] = []

    def add(self, numbers: Sequence[int] | np.ndarray) -> Callable[[], Tensor]:
        """Adds numbers; the returned function gives them on the device, [n] int32, after `send`."""
        index = len(self._parts)
        self._parts.append(np.asarray(numbers, np.int32))
        return lambda: self._views[index]

    def send(self) -> None:
        """Copies everything that was added. Call it once."""
        packed = torch.from_numpy(np.concatenate(self._parts))
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        there = packed.to(self.device, non_blocking=True)
        ends = np.cumsum([0, *map(len, self._parts)]).tolist()
        self._views = [there[start:end] for start, end in pairwise(ends)]
