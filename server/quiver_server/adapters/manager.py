"""Adapters in use: loaded at first use beside the step loop, leased to requests, given back when unused.

Everything here runs in the service's event loop; what may block runs in threads (adapter_reading.py).
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapters.catalog import AdapterNames
from quiver_server.adapters.entry import Entry, Resident, State, Version
from quiver_server.adapters.loader import AdapterReader
from quiver_server.adapters.memory import AdapterMemory
from quiver_server.adapters.revision import Exact
from quiver_server.errors import (
    BusyError,
    DrainingError,
    RequestError,
    StoreUnavailableError,
    UnknownAdapterError,
)
from quiver_server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

# Not the adapter's fault: it may be loaded at the next request.
_PASSING = (BusyError, DrainingError, StoreUnavailableError, UnknownAdapterError)


class AdapterStore:
    """Leases on the adapters that are named, loaded where need be. thread: the loader's own."""

    def __init__(
        self,
        names: AdapterNames,
        reader: AdapterReader,
        memory: AdapterMemory,
        thread: ThreadPoolExecutor,
        metrics: Metrics,
    ) -> None:
        self.names = names
        self.registry = names.registry
        self.changes = names.changes
        self.reader = reader
        self.memory = memory
        self._thread = thread
        self._metrics = metrics

    def close(self) -> None:
        """Wait for a load under way, end the threads, and leave the state to the next server."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
        self.registry.close()

    async def acquire(self, name: str) -> Resident:
        """A lease on the adapter of a name, loading it if need be. Give it back with `release`."""
        entry, prefix = await self.names.find(name)
        entry.waiting[prefix] = entry.waiting.get(prefix, 0) + 1
        try:
            # Looked at again after each wait: what was loaded may have given way before this task went on.
            while (version := entry.known(prefix)) is None or version.draining or version.resident is None:
                if version is not None and version.resident is not None:
                    await self.memory.changed(self.memory.num_changes)
                else:
                    await self.load(entry, prefix)
            resident = version.resident
        finally:
            entry.waiting[prefix] -= 1
            if not entry.waiting[prefix]:
                del entry.waiting[prefix]
        self.memory.lease(resident)
        return resident

    async def release(self, resident: Resident) -> None:
        """A request that used this adapter has ended."""
        await self.memory.release(resident)

    async def load(self, entry: Entry, prefix: str, *, again: bool = False) -> Version:
        """Load once, however many wait for it; content that failed is tried again only when it has changed."""
        if (known := entry.known(prefix)) is not None and prefix:
            prefix = known.revision
        task = entry.loads.get(prefix)
        if task is None:
            task = entry.loads[prefix] = asyncio.create_task(self._load_now(entry, prefix, again))
            self.changes.note(entry.id)
        # Shielded: the load belongs to all who wait for it, not to the client that happened to ask first.
        return await asyncio.shield(task)

    async def read(self, entry: Entry, prefix: str, *, again: bool = False) -> tuple[Version, AdapterWeights]:
        """Read and validate what a name means now, wherever it is nearest, and keep it in main memory and on disk."""
        if not prefix:
            return await self._read_current(entry, again)
        version = entry.known(prefix)
        if version is None:
            revision = await self.reader.find_revision(entry.id, entry.place, prefix)
            if revision is None:
                held = ", ".join(sorted(revision[:12] for revision in entry.versions)) or "none"
                raise UnknownAdapterError(
                    f"adapter {entry.id!r} has no revision {prefix}; kept are: {held}", "adapter_id"
                )
            version = entry.version(revision)
        weights = await self.reader.exact(version.exact, entry.place)
        if weights is None:
            entry.versions.pop(version.revision, None)
            raise UnknownAdapterError(f"adapter {entry.id!r}: its revision {prefix} is kept nowhere", "adapter_id")
        return version, weights

    def retire(self, version: Version) -> Resident | None:
        """Nobody new gets it; its bytes come back when its last request has ended."""
        resident, version.resident, version.draining = version.resident, None, False
        if resident is not None:
            version.entry.leaving.append(resident)
            self.memory.retire(resident)
        return resident

    async def drop_from_host(self, revision: str) -> int:
        """Forget what main memory keeps of a revision; returns the bytes given back."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.reader.host.drop, revision)

    async def _load_now(self, entry: Entry, prefix: str, again: bool) -> Version:
        started = time.monotonic()
        try:
            version, weights = await self.read(entry, prefix, again=again)
            is_kept = self.reader.host.bytes_of(version.revision) > 0
            await self._place(version, weights, 0.0 if is_kept else time.monotonic() - started)
        except RequestError as error:
            self._metrics.adapter_loads.labels("failed").inc()
            if not prefix:
                entry.failure = None if isinstance(error, _PASSING) else error
            raise
        finally:
            del entry.loads[prefix]
            self.changes.note(entry.id)
        if not prefix:
            entry.failure = None
            await self._make_current(entry, version)
        self._metrics.adapter_loads.labels("ok").inc()
        self._metrics.adapter_load_seconds.observe(time.monotonic() - started)
        return version

    async def _place(self, version: Version, weights: AdapterWeights, read_seconds: float) -> None:
        async with version.placing:
            if version.resident is None:
                self.memory.check_size(version, weights)
                await self.memory.place(version, weights, read_seconds)

    async def _make_current(self, entry: Entry, version: Version) -> None:
        previous, entry.current = entry.current, version
        if previous is not None and previous is not version:
            if not self.registry.decided.names(previous.exact):
                self.retire(previous)
            await self.memory.notify()
        await self.reader.ask(self.reader.disk.set_current, version.exact)

    async def _read_current(self, entry: Entry, again: bool) -> tuple[Version, AdapterWeights]:
        try:
            stamp = await self.reader.ask(entry.place.store.stamp, entry.place.path)
            if stamp is not None and stamp == entry.stamp:
                if entry.failure is not None and not again:
                    raise entry.failure
                if entry.failure is None and entry.current is not None:
                    weights = await self.reader.exact(entry.current.exact, entry.place)
                    if weights is not None:
                        return entry.current, weights
            entry.stamp = stamp
            entry.stamp, weights = await self.reader.current(entry.id, entry.place)
            return entry.version(weights.revision), weights
        except StoreUnavailableError as error:
            if again:
                raise
            return await self._read_last_known(entry, error)

    async def _read_last_known(self, entry: Entry, error: StoreUnavailableError) -> tuple[Version, AdapterWeights]:
        """The store does not answer: what the id named last is served on, from here."""
        revision = entry.current.revision if entry.current is not None else self.reader.disk.current(entry.id)
        weights = None if revision is None else await self.reader.exact(Exact(entry.id, revision), entry.place)
        if revision is None or weights is None:
            raise error
        entry.stamp = None
        log.warning("adapter %s is served as it was last, revision %s: %s", entry.id, revision[:12], error)
        return entry.version(revision), weights


def state_of(entry: Entry, store: AdapterStore) -> State:
    """Where the current revision is; an alias of the same name hides it."""
    if entry.id in store.registry.decided.aliases:
        return State.FAILED
    if entry.current is not None and (state := version_state(entry.current, store)) is State.RESIDENT:
        return state
    if entry.loads:
        return State.LOADING
    if entry.failure is not None:
        return State.FAILED
    return State.REGISTERED if entry.current is None else version_state(entry.current, store)


def version_state(version: Version, store: AdapterStore) -> State:
    if version.resident is not None:
        return State.RESIDENT
    if version.placing.locked() or version.revision in version.entry.loads:
        return State.LOADING
    return State.HOST if store.reader.host.bytes_of(version.revision) else State.REGISTERED
