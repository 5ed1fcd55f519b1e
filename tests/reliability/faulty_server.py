"""The real server with a fault put in, as a process: `python -m reliability.faulty_server FAULTS [serve's options]`.

Only the test knows of it: what is replaced is replaced here, and the server's own code has no switch for it.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quiver_server import components
from quiver_server.engine.batch import StepBatch
from quiver_server.engine.model_runner import ModelRunner
from quiver_server.engine.scheduler import ScheduledChunk, Scheduler
from quiver_server.engine.sequence import Sequence
from quiver_server.grpc_api import error_interceptor
from quiver_server.main import main

FAULTY_PROMPT = [313] * 6  # who asks this meets the fault


class FailingRunner(ModelRunner):
    """A step with the prompt in it raises."""

    def run(self, batch: StepBatch) -> Tensor:
        if int((batch.tokens == FAULTY_PROMPT[0]).sum()) >= len(FAULTY_PROMPT):
            raise RuntimeError("a broken kernel")
        return super().run(batch)


class SlowRunner(ModelRunner):
    """A step takes 20 ms, as with a larger model."""

    def run(self, batch: StepBatch) -> Tensor:
        time.sleep(0.02)
        return super().run(batch)


class FailingScheduler(Scheduler):
    """A fault outside of any step: the engine cannot go on."""

    def schedule(self) -> list[ScheduledChunk]:
        waiting: list[Sequence] = list(self.waiting)
        if any(sequence.prompt == FAULTY_PROMPT for sequence in waiting):
            raise IndexError("a fault of the scheduler")
        return super().schedule()


def _replace(module: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


FAULTS: dict[str, Callable[[], None]] = {
    "step": _replace(components, "ModelRunner", FailingRunner),
    "slow": _replace(components, "ModelRunner", SlowRunner),
    "engine": _replace(components, "Scheduler", FailingScheduler),
    "impatient": _replace(error_interceptor, "READER_SECONDS", 1.0),
}

if __name__ == "__main__":
    for fault in sys.argv[1].split(","):
        FAULTS[fault]()
    sys.exit(main(sys.argv[2:]))
