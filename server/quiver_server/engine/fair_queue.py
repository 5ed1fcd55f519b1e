"""Who is next among the waiting: the adapter that was served least, and of its own sequences the most urgent.

Counters of served tokens as in VTC (Sheng et al. 2024, "Fairness in serving large language models"), with a quantum
that bounds what carries over when a tenant comes back: neither its credit nor its debt exceeds it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count

from quiver_server.engine.sequence import Sequence


@dataclass(eq=False)
class _AdapterQueues:
    """num_served: tokens, weighted, that count against it. queues: its waiting sequences by priority, in order."""

    service: float = 0.0
    queues: dict[int, deque[Sequence]] = field(default_factory=dict[int, deque[Sequence]])


class FairQueue:
    """The waiting sequences of all tenants. A tenant is an adapter, or the base.

    quantum: tokens. patience_seconds: after so long a sequence goes before its tenant's higher priorities.
    """

    def __init__(self, quantum: int, patience_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.quantum = quantum
        self._patience_seconds = patience_seconds
        self._now = now
        self._arrivals = count()
        self._adapters: dict[str, _AdapterQueues] = {}
        self._waiting: dict[str, _AdapterQueues] = {}  # those of them that have somebody waiting
        self._floor = 0.0  # the least that any waiting tenant was served: never falls

    def __len__(self) -> int:
        return sum(len(queue) for tenant in self._waiting.values() for queue in tenant.queues.values())

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        queues = [queue for tenant in self._waiting.values() for queue in tenant.queues.values()]
        return iter(sorted(chain.from_iterable(queues), key=lambda sequence: sequence.arrival))

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives."""
        sequence.arrival = next(self._arrivals)
        self._queue_of(sequence).append(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """A sequence that was running stands before those of its tenant that arrived after it."""
        self._queue_of(sequence).appendleft(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, because it runs now or will never; False when it does not wait here."""
        tenant = self._waiting.get(sequence.fairness_key)
        queue = tenant.queues.get(sequence.priority) if tenant is not None else None
        if tenant is None or queue is None or sequence not in queue:
            return False
        self._raise_floor()
        queue.remove(sequence)
        if not queue:
            del tenant.queues[sequence.priority]
        if not tenant.queues:
            del self._waiting[sequence.fairness_key]
        return True

    def peek_all(self) -> list[Sequence]:
        """Of each tenant that waits, the sequence that is next."""
        return [self._head(tenant) for tenant in self._waiting.values()]

    def peek(self, tenant_id: str) -> Sequence | None:
        """The sequence of this tenant that is next, if one waits."""
        tenant = self._waiting.get(tenant_id)
        return None if tenant is None else self._head(tenant)

    def is_overdue(self, sequence: Sequence) -> bool:
        """Whether it has waited longer than anybody should."""
        return self._now() - sequence.waiting_since_seconds > self._patience_seconds

    def service_received(self, tenant_id: str) -> float:
        """What counts against a tenant; the least is served next."""
        tenant = self._adapters.get(tenant_id)
        return 0.0 if tenant is None else tenant.service

    def add_service(self, tenant_id: str, num_tokens: float) -> None:
        """A tenant is served so many tokens."""
        self._adapters[tenant_id].service += num_tokens

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        """Where a sequence is to wait from now on; a tenant of which nobody waited takes part again."""
        sequence.waiting_since_seconds = self._now()
        tenant = self._adapters.setdefault(sequence.fairness_key, _AdapterQueues())
        if sequence.fairness_key not in self._waiting:
            self._raise_floor()
            low, high = self._floor - self.quantum, self._floor + self.quantum
            tenant.service = min(max(tenant.service, low), high)
            self._waiting[sequence.fairness_key] = tenant
        return tenant.queues.setdefault(sequence.priority, deque())

    def _raise_floor(self) -> None:
        if self._waiting:
            self._floor = max(self._floor, min(tenant.service for tenant in self._waiting.values()))

    def _head(self, tenant: _AdapterQueues) -> Sequence:
        firsts = [queue[0] for queue in tenant.queues.values()]
        if len(firsts) == 1:
            return firsts[0]
        overdue = [sequence for sequence in firsts if self.is_overdue(sequence)]
        if overdue:
            return min(overdue, key=lambda sequence: sequence.arrival)
        return max(firsts, key=lambda sequence: sequence.priority)
