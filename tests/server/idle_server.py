"""What a server's metrics are made of, without the server: for tests of what they say."""

from pathlib import Path

import torch

from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapter_store import AdapterStore
from quiver_server.blocks import BlockPool
from quiver_server.load_metrics import LoadMetrics
from quiver_server.metrics import Metrics
from quiver_server.scheduler import Scheduler
from quiver_server.weights_cache import WeightsCache

CAPACITY_BYTES = 4096
MAX_ADAPTERS = 8


def _read_nothing(folder: Path) -> AdapterWeights:
    raise AssertionError(folder)


class IdleServer:
    """The parts, with nothing running. adapters: the store's folder."""

    def __init__(self, adapters: Path) -> None:
        self.metrics = Metrics()
        self.blocks = BlockPool(4, 16)
        self.scheduler = Scheduler(self.blocks, 1, 1)
        banks = AdapterBanks(CAPACITY_BYTES, torch.float32, torch.device("cpu"))
        self.store = AdapterStore(adapters, banks, WeightsCache(_read_nothing, 0), self.metrics)
        self.store.close()
        load = LoadMetrics("base", self.scheduler, self.blocks, self.store, MAX_ADAPTERS)
        self.metrics.registry.register(load)
