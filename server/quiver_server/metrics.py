"""What the server tells Prometheus. Labels are bounded: adapter ids are those of the store, codes are gRPC's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from quiver_server.blocks import BlockPool
from quiver_server.scheduler import Scheduler

_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, blocks: BlockPool) -> None:
        self.registry = CollectorRegistry()
        self._blocks = blocks
        r = self.registry
        self.requests = Counter("quiver_requests", "Finished requests.", ("adapter", "code"), registry=r)
        self.prompt_tokens = Counter("quiver_prompt_tokens", "Prompt tokens.", ("adapter",), registry=r)
        self.cached_prompt_tokens = Counter(
            "quiver_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache and not computed again.",
            ("adapter",),
            registry=r,
        )
        self.generated_tokens = Counter("quiver_generated_tokens", "Generated tokens.", ("adapter",), registry=r)
        self.time_to_first_token = Histogram(
            "quiver_time_to_first_token_seconds", "Arrival to first token.", buckets=_LATENCY_BUCKETS, registry=r
        )
        self.inter_token = Histogram(
            "quiver_inter_token_seconds", "Between tokens of one answer.", buckets=_LATENCY_BUCKETS, registry=r
        )
        self.adapter_loads = Counter("quiver_adapter_loads", "Adapter loads.", ("result",), registry=r)
        self.adapter_load_seconds = Histogram(
            "quiver_adapter_load_seconds", "Reading and placing one adapter.", buckets=_LATENCY_BUCKETS, registry=r
        )
        self.adapter_evictions = Counter("quiver_adapter_evictions", "Adapters that gave way to others.", registry=r)
        self.resident_adapters = Gauge("quiver_resident_adapters", "Adapters in memory.", registry=r)
        self.adapter_free_bytes = Gauge("quiver_adapter_free_bytes", "Adapter memory not in use.", registry=r)
        self._step_seconds = Histogram("quiver_step_seconds", "One engine step.", buckets=_STEP_BUCKETS, registry=r)
        self._running = Gauge("quiver_running_sequences", "Sequences in the running batch.", registry=r)
        self._waiting = Gauge("quiver_waiting_sequences", "Sequences in the engine's queue.", registry=r)
        self._kv_usage = Gauge("quiver_kv_usage_ratio", "Used share of the key-value cache, 0 to 1.", registry=r)

    def observe_step(self, seconds: float, scheduler: Scheduler) -> None:
        """One step took `seconds`."""
        self._step_seconds.observe(seconds)
        self.observe_load(scheduler)

    def observe_load(self, scheduler: Scheduler) -> None:
        """How full the engine is now."""
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.waiting))
        self._kv_usage.set(1 - self._blocks.num_free_blocks / self._blocks.num_blocks)
