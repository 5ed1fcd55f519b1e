"""What a server's metrics are made of, without the server: for tests of what they say."""

from pathlib import Path

import torch

from quiver_peft.adapters.formats.adapter_files import AdapterFiles
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapters.open import open_adapters
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.scheduler import Scheduler
from quiver_server.load_metrics import LoadMetrics
from quiver_server.telemetry.metrics import Metrics

CAPACITY_BYTES = 4096
MAX_ADAPTERS = 8


def _read_nothing(files: AdapterFiles) -> AdapterWeights:
    raise AssertionError(files)


class IdleServer:
    """The parts, with nothing running. adapters: the store's folder."""

    def __init__(self, adapters: Path) -> None:
        self.metrics = Metrics()
        self.blocks = BlockPool(4, 16)
        self.scheduler = Scheduler(self.blocks, 1, 1)
        banks = AdapterBanks(CAPACITY_BYTES, torch.float32, torch.device("cpu"))
        self.store, _ = open_adapters(
            [str(adapters)], None, banks, _read_nothing, self.metrics, host_bytes=0, disk_bytes=0
        )
        load = LoadMetrics("base", self.scheduler, self.blocks, self.store, MAX_ADAPTERS)
        self.metrics.registry.register(load)
