"""The adapter memory as the store sees it: who gets room next, who gives way, who must finish first.

Lives in the service's event loop; only the copying into the banks happens in the loader's thread.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from quiver_peft.adapters.serving.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.summary import summary
from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapters.entry import LoadedRevision, Revision
from quiver_server.adapters.eviction import GdsfPolicy, ResidentRange, choose_victims
from quiver_server.errors import AdapterTooLargeError, BusyError
from quiver_server.telemetry.metrics import Metrics

_MAX_WAIT_SECONDS = 60.0  # how long a request waits for memory that other adapters' requests hold
_DRAIN_AFTER_SECONDS = 3.0  # how long before one of these adapters gets no new requests until it has given way


@dataclass(eq=False)
class _Waiter:
    """An adapter that waits for room."""

    since_seconds: float


class AdapterMemory:
    """Residents, from their placing to the return of their bytes."""

    def __init__(
        self, banks: AdapterBanks, thread: Executor, metrics: Metrics, on_change: Callable[[str], None]
    ) -> None:
        """on_change: told the id of an adapter that has come or gone."""
        self._banks = banks
        self._on_change = on_change
        self._thread = thread
        self._metrics = metrics
        self._policy = GdsfPolicy()
        self._residents: dict[int, Revision] = {}  # by slot, those that can still be asked for
        self._waiters: list[_Waiter] = []  # first come, first served
        self._changed = asyncio.Condition()
        self.num_changes = 0  # so that nobody who looks, then waits, misses one

    @property
    def capacity_bytes(self) -> int:
        """Of the whole adapter memory."""
        return self._banks.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Not in use. Callable from any thread."""
        return self._banks.free_bytes

    def check_size(self, version: Revision, weights: AdapterWeights) -> None:
        """Refuse for good, and evict nobody for, what could never be placed. Raises AdapterTooLargeError."""
        needed, capacity = self._banks.num_bytes(weights), self._banks.capacity_bytes
        if needed > capacity:
            raise AdapterTooLargeError(
                f"adapter {version.entry.id!r} needs {needed} bytes; the whole adapter memory of this server has "
                f"{capacity} (--adapter-memory-mib)",
                "adapter_id",
            )

    async def place(self, version: Revision, weights: AdapterWeights, read_seconds: float) -> LoadedRevision:
        """Bring an adapter in, which becomes the version's resident; others give way, when they have ended.

        read_seconds: what reading it again would take. Raises BusyError when there is no room for too long.
        """
        async with self._wait_in_line() as wish:
            while True:
                num_changes = self.num_changes
                slots = self._eviction_plan(weights) if self._is_first(wish) else None
                if slots is not None:
                    return await self._clear_and_insert(version, weights, slots, read_seconds)
                await self._wait(wish, self._banks.num_bytes(weights), num_changes)

    def lease(self, resident: LoadedRevision) -> None:
        """A request uses it from now on."""
        resident.num_leases += 1
        resident.num_uses += 1
        resident.priority = self._policy.priority(resident.num_uses, resident.reload_seconds, resident.num_bytes)

    async def release(self, resident: LoadedRevision) -> None:
        """A request that used it has ended."""
        resident.num_leases -= 1
        if resident.retired and not resident.num_leases:
            self._free(resident)
        await self.notify()

    def retire(self, resident: LoadedRevision) -> None:
        """Nobody new will ask for it; its bytes come back when its last request has ended."""
        self._residents.pop(resident.slot, None)
        resident.retired = True
        if not resident.num_leases:
            self._free(resident)

    async def changed(self, num_changes: int) -> None:
        """Until something has ended, come or gone since `num_changes` was read."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.num_changes != num_changes)

    async def notify(self) -> None:
        """Something has: whoever waits looks again."""
        self.num_changes += 1
        async with self._changed:
            self._changed.notify_all()

    @asynccontextmanager
    async def _wait_in_line(self) -> AsyncGenerator[_Waiter]:
        wish = _Waiter(time.monotonic())
        self._waiters.append(wish)
        try:
            yield wish
        finally:
            self._waiters.remove(wish)
            for other in self._residents.values():
                other.draining = False  # who is still without room says so again
            await self.notify()

    def _is_first(self, wish: _Waiter) -> bool:
        return self._waiters[0] is wish

    def _eviction_plan(self, weights: AdapterWeights) -> list[int] | None:
        """The slots that must be cleared for it, or None."""
        occupied = [
            ResidentRange(slot, start, end, self._eviction_priority(self._residents.get(slot)))
            for slot, (start, end) in self._banks.occupied().items()
        ]
        return choose_victims(occupied, self._banks.capacity_bytes, self._banks.num_bytes(weights))

    def _eviction_priority(self, version: Revision | None) -> float | None:
        """None: it stays, because somebody uses it, is about to, or has pinned it."""
        resident = None if version is None else version.resident
        if version is None or resident is None or resident.num_leases or version.pinned:
            return None
        if version.draining:
            return 0.0
        return None if version.num_waiting else resident.priority

    async def _clear_and_insert(
        self, version: Revision, weights: AdapterWeights, slots: list[int], read_seconds: float
    ) -> LoadedRevision:
        for slot in slots:
            self._evict(self._residents[slot])
        started = time.monotonic()
        slot = await asyncio.get_running_loop().run_in_executor(self._thread, self._banks.insert, weights)
        assert slot is not None, "room was made, and only the first in line places anything"
        resident = LoadedRevision(
            version.entry.id,
            weights.revision,
            weights.methods,
            slot,
            self._banks.num_bytes(weights),
            num_parameters=weights.num_parameters,
            max_rank=weights.max_rank,
            num_prefix_tokens=weights.num_prefix_tokens,
            num_prompt_tokens=weights.num_prompt_tokens,
            base_fingerprint=weights.base_fingerprint,
            description=summary(weights),
            reload_seconds=read_seconds + time.monotonic() - started,
        )
        resident.priority = self._policy.priority(0, resident.reload_seconds, resident.num_bytes)
        version.resident = resident
        self._residents[slot] = version
        self._on_change(resident.id)
        return resident

    def _evict(self, version: Revision) -> None:
        resident, version.resident, version.draining = version.resident, None, False
        assert resident is not None
        self._policy.on_evicted(resident.priority)
        self._metrics.adapter_evictions.inc()
        self.retire(resident)

    async def _wait(self, wish: _Waiter, needed: int, num_changes: int) -> None:
        """Nothing can give way now: wait until some request ends. Raises BusyError when that takes too long."""
        busy = BusyError(f"no adapter memory for {needed} bytes: all resident adapters are pinned or in use")
        waited = time.monotonic() - wish.since_seconds
        patience = _MAX_WAIT_SECONDS
        if self._is_first(wish):
            if not any(self._is_used(version) for version in self._residents.values()) and self._none_retiring():
                raise busy
            if waited > _DRAIN_AFTER_SECONDS:
                self._drain_one()
            else:
                patience = _DRAIN_AFTER_SECONDS
        if waited > _MAX_WAIT_SECONDS:
            raise busy
        try:
            async with asyncio.timeout(max(patience - waited, 0.0) + 0.01):
                await self.changed(num_changes)
        except TimeoutError:
            return  # looked at again above

    def _is_used(self, version: Revision) -> bool:
        return version.num_waiting > 0 or (version.resident is not None and version.resident.num_leases > 0)

    def _none_retiring(self) -> bool:
        """Otherwise some are retired, and give their bytes back soon."""
        return len(self._banks.occupied()) == len(self._residents)

    def _drain_one(self) -> None:
        """Of those in use, the one with the least left to generate gets no new request until it has given way."""
        running = [
            (version.resident.num_remaining_tokens, version)
            for version in self._residents.values()
            if version.resident is not None and version.resident.num_leases and not version.pinned
        ]
        if running and not any(version.draining for _, version in running):
            min(running, key=lambda item: item[0])[1].draining = True

    def _free(self, resident: LoadedRevision) -> None:
        assert resident.slot != BASE_SLOT
        self._banks.remove(resident.slot)
        resident.released.set()
        self._on_change(resident.id)
