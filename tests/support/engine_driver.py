"""An engine on a real tiny model, stepped by hand."""

from collections.abc import Callable

import torch
from torch import Tensor

from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedKV
from quiver_peft.base.t5 import T5Base
from quiver_server.engine.batch import StepBatch
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.engine import Delivery, Engine
from quiver_server.engine.model_runner import ModelRunner
from quiver_server.engine.scheduler import Scheduler
from quiver_server.engine.sequence import Sequence, TokenEvent
from quiver_server.telemetry.metrics import Metrics

BLOCK_SIZE = 4
CPU = torch.device("cpu")


class FailingRunner(ModelRunner):
    """Fails once, in the step that `should_fail` chooses. num_rows: tokens computed so far."""

    should_fail: Callable[[StepBatch], bool] | None = None
    num_rows = 0

    def run(self, batch: StepBatch) -> Tensor:
        if self.should_fail is not None and self.should_fail(batch):
            self.should_fail = None
            raise RuntimeError("a broken kernel")
        self.num_rows += len(batch.tokens)
        return super().run(batch)


class Driver:
    """An engine that is stepped by hand, and what it said for each sequence."""

    def __init__(
        self, base: GPTBase | T5Base, num_blocks: int, max_step_tokens: int = 16, *, share: bool = True
    ) -> None:
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE, share=share)
        self.scheduler = Scheduler(self.blocks, 8, max_step_tokens)
        kv = PagedKV(base.config, num_blocks, BLOCK_SIZE, torch.float32, CPU)
        self.banks = AdapterBanks(2**20, torch.float32, CPU)
        self.runner = FailingRunner(base, self.banks, kv, max_step_tokens)
        self.events: dict[Sequence, list[TokenEvent]] = {}
        self.num_step_backs = 0
        self.engine = Engine(
            self.runner,
            self.scheduler,
            block_size=BLOCK_SIZE,
            device=CPU,
            metrics=Metrics(),
            deliver=self._take,
            on_dead=lambda: None,
        )

    def _take(self, events: Delivery) -> None:
        for item, event in events:
            self.events.setdefault(item, []).append(event)

    def run(self, sequences: list[Sequence]) -> list[list[int]]:
        """Until all have ended; returns their tokens."""
        for item in sequences:
            self.scheduler.add(item)
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            running = set(map(id, self.scheduler.running))
            self.engine.step()
            self.num_step_backs += sum(id(item) in running for item in self.scheduler.waiting)
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        return [self.tokens(item) for item in sequences]

    def tokens(self, item: Sequence) -> list[int]:
        return [event.token_id for event in self.events.get(item, []) if event.token_id is not None]
