"""Gauges of how full the server is, read when somebody asks: its queue, its cache, its adapters, tier by tier.

Among them those that routers of the Kubernetes Gateway API (inference extension, llm-d) read to choose a replica, under
vLLM's names: https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003.
"""

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quiver_server.adapters.manager import AdapterManager
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.scheduler import Scheduler


class LoadMetrics(Collector):
    """Read from the scrape's own thread: only lengths and copies are taken of what others change meanwhile.

    model_name: of the base. max_adapters: slots, where there is a limit to them beside the adapter memory.
    """

    def __init__(
        self, model_name: str, scheduler: Scheduler, blocks: BlockPool, store: AdapterManager, max_adapters: int
    ) -> None:
        self._model_name = model_name
        self._scheduler = scheduler
        self._blocks = blocks
        self._store = store
        self._max_adapters = max_adapters

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        yield from self._engine()
        yield from self._adapters()
        yield from self._for_routers()

    @property
    def _kv_usage(self) -> float:
        return 1 - self._blocks.num_free_blocks / self._blocks.num_blocks

    def _engine(self) -> Iterator[Metric]:
        running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        yield GaugeMetricFamily("quiver_running_sequences", "Sequences in the running batch.", running)
        yield GaugeMetricFamily("quiver_waiting_sequences", "Sequences in the engine's queue.", waiting)
        yield GaugeMetricFamily("quiver_kv_usage_ratio", "Used share of the key-value cache, 0 to 1.", self._kv_usage)

    def _adapters(self) -> Iterator[Metric]:
        store = self._store
        known = store.names.known
        waiting = sum(entry.num_waiting for entry in known if entry.resident is None)
        yield GaugeMetricFamily("quiver_known_adapters", "Adapters that can be asked for.", len(known))
        yield GaugeMetricFamily("quiver_adapter_waiting_requests", "Requests that wait for their adapter.", waiting)
        yield GaugeMetricFamily("quiver_resident_adapters", "Adapters in memory.", len(self._resident()))
        yield GaugeMetricFamily("quiver_adapter_free_bytes", "Adapter memory not in use.", store.memory.free_bytes)
        tiers = GaugeMetricFamily("quiver_adapter_bytes", "Memory that adapters take, by tier.", labels=["tier"])
        tiers.add_metric(["device"], store.memory.capacity_bytes - store.memory.free_bytes)
        tiers.add_metric(["host"], store.reader.host.num_bytes)
        tiers.add_metric(["disk"], store.reader.disk.num_bytes)
        yield tiers
        hits = store.reader.host.num_hits
        yield CounterMetricFamily("quiver_adapter_host_hits", "Loads that found the adapter in main memory.", hits)

    def _for_routers(self) -> Iterator[Metric]:
        waiting = [entry for entry in self._store.names.known if entry.num_waiting and entry.resident is None]
        in_line = len(self._scheduler.waiting) + sum(entry.num_waiting for entry in waiting)
        yield self._vllm("num_requests_running", "Sequences in the running batch.", len(self._scheduler.running))
        yield self._vllm("num_requests_waiting", "Sequences that wait, for their turn or their adapter.", in_line)
        yield self._vllm("kv_cache_usage_perc", "Used share of the key-value cache, 0 to 1.", self._kv_usage)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The key-value cache's form.", labels=["block_size", "num_gpu_blocks"]
        )
        info.add_metric([str(self._blocks.block_size), str(self._blocks.num_blocks)], 1)
        yield info
        resident = self._resident()
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in memory and adapters that are waited for; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        ids = [",".join(sorted(resident)), ",".join(sorted(entry.id for entry in waiting))]
        adapters.add_metric([str(self._room_for(resident)), *ids], time.time())
        yield adapters

    def _vllm(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", what, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _resident(self) -> dict[str, int]:
        """{id: bytes} of the adapters in memory."""
        residents = [entry.resident for entry in self._store.names.known]
        return {resident.id: resident.num_bytes for resident in residents if resident is not None}

    def _room_for(self, resident: dict[str, int]) -> int:
        """How many adapters fit: memory counts bytes, so those that are there, and more of their mean size."""
        if not resident:
            return self._max_adapters
        mean = max(sum(resident.values()) // len(resident), 1)
        return min(len(resident) + self._store.memory.free_bytes // mean, self._max_adapters)
