"""Adapters in use: loaded at first use beside the step loop, leased to requests, given back when unused.

Everything here runs in the service's event loop; what may block runs in threads (adapter_reading.py).
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapters.catalog import AdapterCatalog
from quiver_server.adapters.entry import KnownAdapter, LoadedRevision, Revision, State
from quiver_server.adapters.loader import AdapterLoader
from quiver_server.adapters.memory import AdapterMemory
from quiver_server.adapters.revision import RevisionKey
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
_TRANSIENT = (BusyError, DrainingError, StoreUnavailableError, UnknownAdapterError)


class AdapterManager:
    """Leases on the adapters that are named, loaded where need be. thread: the loader's own."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        loader: AdapterLoader,
        memory: AdapterMemory,
        thread: ThreadPoolExecutor,
        metrics: Metrics,
    ) -> None:
        self.names = catalog
        self.registry = catalog.registry
        self.changes = catalog.changes
        self.reader = loader
        self.memory = memory
        self._thread = thread
        self._metrics = metrics

    def close(self) -> None:
        """Wait for a load under way, end the threads, and leave the state to the next server."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
        self.registry.close()

    async def acquire(self, name: str) -> LoadedRevision:
        """A lease on the adapter of a name, loading it if need be. Give it back with `release`."""
        entry, prefix = await self.names.lookup(name)
        entry.waiting[prefix] = entry.waiting.get(prefix, 0) + 1
        try:
            # Looked at again after each wait: what was loaded may have given way before this task went on.
            while (version := entry.find_revision(prefix)) is None or version.draining or version.resident is None:
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

    async def release(self, resident: LoadedRevision) -> None:
        """A request that used this adapter has ended."""
        await self.memory.release(resident)

    async def load(self, entry: KnownAdapter, prefix: str, *, again: bool = False) -> Revision:
        """Load once, however many wait for it; content that failed is tried again only when it has changed."""
        if (known := entry.find_revision(prefix)) is not None and prefix:
            prefix = known.revision
        task = entry.loads.get(prefix)
        if task is None:
            task = entry.loads[prefix] = asyncio.create_task(self._load_now(entry, prefix, again))
            self.changes.notify(entry.id)
        # Shielded: the load belongs to all who wait for it, not to the client that happened to ask first.
        return await asyncio.shield(task)

    async def load_weights(
        self, entry: KnownAdapter, prefix: str, *, again: bool = False
    ) -> tuple[Revision, AdapterWeights]:
        """Read and validate what a name means now, wherever it is nearest, and keep it in main memory and on disk."""
        if not prefix:
            return await self._read_current(entry, again)
        version = entry.find_revision(prefix)
        if version is None:
            revision = await self.reader.find_revision(entry.id, entry.location, prefix)
            if revision is None:
                held = ", ".join(sorted(revision[:12] for revision in entry.revisions)) or "none"
                raise UnknownAdapterError(
                    f"adapter {entry.id!r} has no revision {prefix}; kept are: {held}", "adapter_id"
                )
            version = entry.add_revision(revision)
        weights = await self.reader.load_revision(version.revision_key, entry.location)
        if weights is None:
            entry.revisions.pop(version.revision, None)
            raise UnknownAdapterError(f"adapter {entry.id!r}: its revision {prefix} is kept nowhere", "adapter_id")
        return version, weights

    def retire(self, version: Revision) -> LoadedRevision | None:
        """Nobody new gets it; its bytes come back when its last request has ended."""
        resident, version.resident, version.draining = version.resident, None, False
        if resident is not None:
            version.entry.leaving.append(resident)
            self.memory.retire(resident)
        return resident

    async def drop_from_host(self, revision: str) -> int:
        """Forget what main memory keeps of a revision; returns the bytes given back."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.reader.host.drop, revision)

    async def _load_now(self, entry: KnownAdapter, prefix: str, again: bool) -> Revision:
        started = time.monotonic()
        try:
            version, weights = await self.load_weights(entry, prefix, again=again)
            is_kept = self.reader.host.bytes_of(version.revision) > 0
            await self._place(version, weights, 0.0 if is_kept else time.monotonic() - started)
        except RequestError as error:
            self._metrics.adapter_loads.labels("failed").inc()
            if not prefix:
                entry.failure = None if isinstance(error, _TRANSIENT) else error
            raise
        finally:
            del entry.loads[prefix]
            self.changes.notify(entry.id)
        if not prefix:
            entry.failure = None
            await self._make_current(entry, version)
        self._metrics.adapter_loads.labels("ok").inc()
        self._metrics.adapter_load_seconds.observe(time.monotonic() - started)
        return version

    async def _place(self, version: Revision, weights: AdapterWeights, read_seconds: float) -> None:
        async with version.placing:
            if version.resident is None:
                self.memory.check_size(version, weights)
                await self.memory.place(version, weights, read_seconds)

    async def _make_current(self, entry: KnownAdapter, version: Revision) -> None:
        previous, entry.current = entry.current, version
        if previous is not None and previous is not version:
            if not self.registry.state.names(previous.revision_key):
                self.retire(previous)
            await self.memory.notify()
        await self.reader.submit(self.reader.disk.set_current, version.revision_key)

    async def _read_current(self, entry: KnownAdapter, again: bool) -> tuple[Revision, AdapterWeights]:
        try:
            stamp = await self.reader.submit(entry.location.store.etag, entry.location.path)
            if stamp is not None and stamp == entry.stamp:
                if entry.failure is not None and not again:
                    raise entry.failure
                if entry.failure is None and entry.current is not None:
                    weights = await self.reader.load_revision(entry.current.revision_key, entry.location)
                    if weights is not None:
                        return entry.current, weights
            entry.stamp = stamp
            entry.stamp, weights = await self.reader.load_current(entry.id, entry.location)
            return entry.add_revision(weights.revision), weights
        except StoreUnavailableError as error:
            if again:
                raise
            return await self._read_last_known(entry, error)

    async def _read_last_known(
        self, entry: KnownAdapter, error: StoreUnavailableError
    ) -> tuple[Revision, AdapterWeights]:
        """The store does not answer: what the id named last is served on, from here."""
        revision = entry.current.revision if entry.current is not None else self.reader.disk.current(entry.id)
        weights = (
            None
            if revision is None
            else await self.reader.load_revision(RevisionKey(entry.id, revision), entry.location)
        )
        if revision is None or weights is None:
            raise error
        entry.stamp = None
        log.warning("adapter %s is served as it was last, revision %s: %s", entry.id, revision[:12], error)
        return entry.add_revision(revision), weights


def state_of(entry: KnownAdapter, store: AdapterManager) -> State:
    """Where the current revision is; an alias of the same name hides it."""
    if entry.id in store.registry.state.aliases:
        return State.FAILED
    if entry.current is not None and (state := revision_state(entry.current, store)) is State.RESIDENT:
        return state
    if entry.loads:
        return State.LOADING
    if entry.failure is not None:
        return State.FAILED
    return State.REGISTERED if entry.current is None else revision_state(entry.current, store)


def revision_state(version: Revision, store: AdapterManager) -> State:
    if version.resident is not None:
        return State.RESIDENT
    if version.placing.locked() or version.revision in version.entry.loads:
        return State.LOADING
    return State.HOST if store.reader.host.bytes_of(version.revision) else State.REGISTERED
