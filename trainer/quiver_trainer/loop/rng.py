"""Per-run RNG: a run draws the same numbers whether it trains alone or beside others."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


class RunRng:
    """States of torch's generators that advance only within `scope`.

    states: {"cpu": ..., "cuda": ... if used}, as `torch.get_rng_state` returns them; kept in checkpoints.
    """

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng(devices=_cuda_devices()):
            torch.manual_seed(seed)
            self.states = _current_states()

    @contextmanager
    def scope(self) -> Generator[None]:
        """Within this context torch draws from this run's states."""
        outer = _current_states()
        _set_states(self.states)
        try:
            yield
        finally:
            self.states = _current_states()
            _set_states(outer)


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _current_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if _cuda_devices():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and _cuda_devices():
        torch.cuda.set_rng_state(states["cuda"])
