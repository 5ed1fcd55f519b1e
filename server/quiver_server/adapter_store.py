"""The adapters a server knows: found in its stores, loaded at first use beside the step loop, given back when unused.

A name is an id (the content of its store now), "id@revision" (that one, wherever it is kept) or an alias (an exact
revision too). Everything here runs in the service's event loop; what may block runs in threads (adapter_reading.py).
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapter_entry import Entry, Resident, Version, parse_name
from quiver_server.adapter_memory import AdapterMemory
from quiver_server.adapter_reading import AdapterReader
from quiver_server.adapter_sources import AdapterSources, Place
from quiver_server.adapter_watch import Changes
from quiver_server.disk_cache import Exact
from quiver_server.errors import (
    BusyError,
    DrainingError,
    RequestError,
    StoreUnavailableError,
    UnknownAdapterError,
)
from quiver_server.metrics import Metrics
from quiver_server.registry import Registry

log = logging.getLogger(__name__)

_MISSED_SECONDS = 1.0  # how long an id that no store has is not looked for again
_MAX_MISSED = 10_000
# Not the adapter's fault: it may be loaded at the next request.
_PASSING = (BusyError, DrainingError, StoreUnavailableError, UnknownAdapterError)


@dataclass(frozen=True)
class StoreParts:
    """What the store stands on."""

    sources: AdapterSources
    registry: Registry
    reader: AdapterReader
    memory: AdapterMemory
    thread: ThreadPoolExecutor
    changes: Changes


class AdapterStore:
    """Names to residents."""

    def __init__(self, parts: StoreParts, metrics: Metrics) -> None:
        self.registry = parts.registry
        self.reader = parts.reader
        self.memory = parts.memory
        self.changes = parts.changes
        self._sources = parts.sources
        self._thread = parts.thread
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        self._missed: dict[str, float] = {}  # ids that no store has: until when that is believed
        for adapter_id, source in self.registry.decided.sources.items():
            try:
                self.add(adapter_id, self._sources.at(source))
            except RequestError as error:
                log.error("the adapter %s cannot be found: %s", adapter_id, error)

    def close(self) -> None:
        """Wait for a load under way, end the threads, and leave the state to the next server."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
        self.registry.close()

    async def entries(self) -> list[Entry]:
        """Every adapter known now, in order of ids; new ones are found here, and those that are gone forgotten."""
        try:
            for adapter_id, place in (await self.reader.ask(self._sources.places)).items():
                self.add(adapter_id, place)
            for entry in list(self._entries.values()):
                await self._is_there(entry)
        except StoreUnavailableError as error:
            log.warning("the list of adapters may lack some: %s", error)
        return sorted(self._entries.values(), key=lambda entry: entry.id)

    @property
    def known(self) -> tuple[Entry, ...]:
        """Every adapter that was found so far. Callable from any thread."""
        return tuple(self._entries.values())

    def peek(self, adapter_id: str) -> Entry | None:
        """An entry as it is, without asking a store."""
        return self._entries.get(adapter_id)

    async def find(self, name: str) -> tuple[Entry, str]:
        """The entry of a name, and the beginning of the revision that it means, "" for the current one.

        Raises InvalidRequestError (malformed), UnknownAdapterError or StoreUnavailableError.
        """
        adapter_id, prefix = parse_name(name)
        if (exact := self.registry.decided.aliases.get(adapter_id)) is not None and not prefix:
            adapter_id, prefix = exact
        entry = self._entries.get(adapter_id)
        if entry is None and (place := await self._locate(adapter_id)) is not None:
            entry = self.add(adapter_id, place)
        if entry is None:
            raise _unknown(adapter_id)
        return entry, prefix

    async def get(self, name: str) -> Entry:
        """The entry of a name whose adapter is there or in use. Raises as `find` does."""
        entry, _ = await self.find(name)
        try:
            is_there = await self._is_there(entry)
        except StoreUnavailableError:
            return entry
        if not is_there:
            raise _unknown(entry.id)
        return entry

    def add(self, adapter_id: str, place: Place) -> Entry:
        """Know an adapter, and its revisions that are kept on disk. One that is known stays as it is."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            entry = self._entries[adapter_id] = Entry(adapter_id, place)
            decided = self.registry.decided
            entry.pinned = adapter_id in decided.pins
            for revision in self.reader.disk.revisions(adapter_id):
                version = entry.version(revision)
                version.pinned_itself = str(version.exact) in decided.pins
            self.changes.note(adapter_id)
        return entry

    async def acquire(self, name: str) -> Resident:
        """A lease on the adapter of a name, loading it if need be. Give it back with `release`."""
        entry, prefix = await self.find(name)
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

    async def _locate(self, adapter_id: str) -> Place | None:
        now = time.monotonic()
        if self._missed.get(adapter_id, now) > now:
            return None
        place = await self.reader.ask(self._sources.find, adapter_id, self._is_expected(adapter_id))
        if place is None and self._sources.any_is_remote:
            if len(self._missed) >= _MAX_MISSED:
                self._missed.clear()
            self._missed[adapter_id] = now + _MISSED_SECONDS
        return place

    def _is_expected(self, adapter_id: str) -> bool:
        """Whether an alias or a pin names it: it is served though the store has lost it."""
        decided = self.registry.decided
        named = {*(exact.id for exact in decided.aliases.values()), *(pin.partition("@")[0] for pin in decided.pins)}
        return adapter_id in named and bool(self.reader.disk.revisions(adapter_id))

    async def _is_there(self, entry: Entry) -> bool:
        """Whether an adapter is in its store or in use; otherwise it is forgotten. Raises StoreUnavailableError."""
        if entry.residents or entry.loads or entry.waiting or self._is_expected(entry.id):
            return True
        if await self.reader.ask(entry.place.store.has, entry.place.path):
            return True
        if not (entry.residents or entry.loads or entry.waiting) and self._entries.get(entry.id) is entry:
            del self._entries[entry.id]
            self.changes.note(entry.id)
        return False


def _unknown(adapter_id: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"no adapter has the id {adapter_id!r}; ListAdapters names them all", "adapter_id")
