"""What the server counts for Prometheus. Labels are bounded: methods, codes and phases are few, adapters are capped."""

from collections.abc import Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram

STEP_PHASES = ("schedule", "prepare", "run", "sample")
# Adapters with a label of their own. Those that come later share one: ids can come and go without end.
MAX_ADAPTER_LABELS = 1000
OTHER_ADAPTERS = "(other)"  # not a possible id
_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labelled = {""}  # the base
        self._make_request_metrics()
        self._make_adapter_metrics()
        r = self.registry
        self._step_seconds = Histogram("quiver_step_seconds", "One engine step.", buckets=_STEP_BUCKETS, registry=r)
        phases = Counter(
            "quiver_step_phase_seconds",
            "Time in the phases of engine steps. On a GPU `run` launches and `sample` waits for the results.",
            ("phase",),
            registry=r,
        )
        self._phases = [phases.labels(phase) for phase in STEP_PHASES]

    def _make_request_metrics(self) -> None:
        r = self.registry
        self.calls = Counter("quiver_calls", "Ended calls of every kind.", ("method", "code"), registry=r)
        self.requests = Counter("quiver_requests", "Finished requests.", ("adapter", "code"), registry=r)
        self.prompt_tokens = Counter("quiver_prompt_tokens", "Prompt tokens.", ("adapter",), registry=r)
        self.cached_prompt_tokens = Counter(
            "quiver_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache and not computed again.",
            ("adapter",),
            registry=r,
        )
        self.generated_tokens = Counter("quiver_generated_tokens", "Generated tokens.", ("adapter",), registry=r)
        self.queue = Histogram(
            "quiver_queue_seconds",
            "Arrival to first step, loading of the adapter included.",
            buckets=_LATENCY_BUCKETS,
            registry=r,
        )
        self.time_to_first_token = Histogram(
            "quiver_time_to_first_token_seconds", "Arrival to first token.", buckets=_LATENCY_BUCKETS, registry=r
        )
        self.inter_token = Histogram(
            "quiver_inter_token_seconds", "Between tokens of one answer.", buckets=_LATENCY_BUCKETS, registry=r
        )

    def _make_adapter_metrics(self) -> None:
        r = self.registry
        self.adapter_loads = Counter("quiver_adapter_loads", "Adapter loads.", ("result",), registry=r)
        self.adapter_load_seconds = Histogram(
            "quiver_adapter_load_seconds", "Reading and placing one adapter.", buckets=_LATENCY_BUCKETS, registry=r
        )
        self.adapter_evictions = Counter("quiver_adapter_evictions", "Adapters that gave way to others.", registry=r)

    def adapter_label(self, adapter_id: str) -> str:
        """The label of an adapter that the store has; "" for the base."""
        if adapter_id not in self._labelled:
            if len(self._labelled) > MAX_ADAPTER_LABELS:
                return OTHER_ADAPTERS
            self._labelled.add(adapter_id)
        return adapter_id

    def observe_step(self, marks: Sequence[float]) -> None:
        """One step: when it began, and when each of its phases ended; one that failed has fewer."""
        self._step_seconds.observe(marks[-1] - marks[0])
        for phase, (start, end) in zip(self._phases, pairwise(marks), strict=False):
            phase.inc(end - start)
