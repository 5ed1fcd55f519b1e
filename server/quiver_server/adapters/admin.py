"""What an administrator does to adapters: load, prefetch, pin, unload, and move aliases. Lives in the event loop."""

import asyncio
from enum import Enum

from quiver_server.adapters.entry import KnownAdapter, LoadedRevision, Revision
from quiver_server.adapters.host_cache import size_of
from quiver_server.adapters.manager import AdapterManager
from quiver_server.adapters.revision import RevisionKey, parse_name
from quiver_server.adapters.sources import AdapterSources
from quiver_server.errors import (
    AdapterInUseError,
    AdapterTooLargeError,
    AdapterUnloadedError,
    BusyError,
    InvalidRequestError,
    RequestError,
    UnknownAdapterError,
)


class UnloadPolicy(Enum):
    """What happens to the requests of an adapter that is unloaded."""

    WAIT = "wait"
    REFUSE = "refuse"
    CANCEL = "cancel"


class AdapterAdmin:
    """Changes what the store holds."""

    def __init__(self, store: AdapterManager, sources: AdapterSources) -> None:
        self._store = store
        self._sources = sources

    async def restore_pins(self) -> list[str]:
        """Bring in what an earlier process had pinned; returns why some could not be, no reason not to serve."""
        pins = sorted(self._store.registry.state.pins)
        results = await asyncio.gather(*(self._bring_back(pin) for pin in pins), return_exceptions=True)
        return [f"{pin}: {found}" for pin, found in zip(pins, results, strict=True) if found is not None]

    async def load(self, name: str, source: str = "", *, pin: bool | None = None) -> KnownAdapter:
        """Bring an adapter, or its newer content, onto the device. Running requests finish on what they have."""
        entry, prefix = await self._find(name, source)
        was_pinned = entry.pinned
        if pin and not prefix:
            entry.pinned = True  # first: it could be evicted before this goes on
        try:
            version = entry.find_revision(prefix)
            if prefix and (version is None or version.resident is None):
                version = await self._store.load(entry, prefix)
            elif not prefix:
                version = await self._newest(entry)
            if version is not None and pin is not None:
                await self._pin(entry if not prefix else version, pin)
        except RequestError:
            entry.pinned = was_pinned
            raise
        return entry

    async def prefetch(self, name: str, source: str = "") -> KnownAdapter:
        """Read an adapter into main memory and onto this server's disk, validated."""
        entry, prefix = await self._find(name, source)
        if not prefix and entry.resident is not None and await self._is_up_to_date(entry):
            return entry
        try:
            version, weights = await self._store.load_weights(entry, prefix, again=True)
        except RequestError as error:
            if not prefix:
                entry.failure = error
                self._store.changes.notify(entry.id)
            raise
        if not self._store.reader.host.bytes_of(version.revision):
            raise AdapterTooLargeError(
                f"adapter {entry.id!r} needs {size_of(weights)} bytes of main memory; there are "
                f"{self._store.reader.host.capacity_bytes} (--adapter-host-memory-mib)",
                "adapter_id",
            )
        if not prefix and entry.resident is None:
            entry.current, entry.failure = version, None
        self._store.changes.notify(entry.id)
        return entry

    async def unload(self, name: str, running: UnloadPolicy = UnloadPolicy.WAIT) -> int:
        """Take an adapter out of memory, all its revisions or the one named; returns the bytes given back."""
        entry, prefix = await self._store.names.lookup(name)
        await self._store.names.require(name)
        for wanted, task in list(entry.loads.items()):
            if wanted.startswith(prefix):
                await asyncio.wait([task])
        versions = [version for version in entry.revisions.values() if version.revision.startswith(prefix)]
        # From here to `retire` nothing else runs: who is refused and who is retired is decided at one moment.
        if running is UnloadPolicy.REFUSE:
            _refuse_if_used(entry, prefix, versions)
        pins = [version for version in versions if version.pinned_itself]
        was_pinned, entry.pinned = entry.pinned, entry.pinned and bool(prefix)
        retired = [resident for version in versions if (resident := self._store.retire(version)) is not None]
        leaving = [resident for resident in entry.residents if resident.revision.startswith(prefix)]
        await self._store.memory.notify()
        if was_pinned and not entry.pinned:
            await self._store.registry.set_pin(entry.id, False)
        for version in pins:
            await self._pin(version, False)
        if running is UnloadPolicy.CANCEL:
            _cancel_requests(leaving)
        for resident in leaving:
            await resident.released.wait()
        freed = sum(resident.num_bytes for resident in retired)
        for version in versions:
            freed += await self._store.drop_from_host(version.revision)
        self._store.changes.notify(entry.id)
        return freed

    async def set_alias(self, alias: str, target: str) -> tuple[RevisionKey, RevisionKey | None]:
        """Make a name answer with one exact revision; returns it and what the name answered with before.

        The revision is brought onto the device first: when that fails, nothing has changed.
        """
        if parse_name(alias, "alias")[1]:
            raise InvalidRequestError(f"alias {alias!r} must be a name alone, without a revision", "alias")
        if await self._is_adapter(alias):
            raise InvalidRequestError(
                f"alias {alias!r} is the id of an adapter, which it would hide; choose another name", "alias"
            )
        resident = await self._store.acquire(target)
        try:
            exact = RevisionKey(resident.id, resident.revision)
            entry, _ = await self._store.names.lookup(str(exact))
            registry = self._store.registry
            previous = await registry.set_alias(alias, exact)
            # Now that it is named it is not evicted from the disk any more.
            if not await self._store.reader.is_cached(exact, entry.location):
                await registry.set_alias(alias, previous)
                raise BusyError(f"this server's disk has no room to keep {exact} for an alias (--cache-mib)")
        finally:
            await self._store.release(resident)
        for adapter_id in {exact.id, previous.id if previous is not None else exact.id}:
            self._store.changes.notify(adapter_id)
        return exact, previous

    async def delete_alias(self, alias: str) -> RevisionKey:
        """Take an alias away; returns what it named."""
        previous = None
        if alias in self._store.registry.state.aliases:
            previous = await self._store.registry.set_alias(alias, None)
        if previous is None:
            raise UnknownAdapterError(f"there is no alias {alias!r}", "alias")
        self._store.changes.notify(previous.id)
        return previous

    async def _find(self, name: str, source: str) -> tuple[KnownAdapter, str]:
        """The entry of a name; with a source, the id is registered to be read from there."""
        if not source:
            entry, prefix = await self._store.names.lookup(name)
            return entry, prefix
        adapter_id, prefix = parse_name(name)
        if prefix or adapter_id in self._store.registry.state.aliases:
            raise InvalidRequestError(f"a source is registered for an id, not for {name!r}", "adapter_id")
        place = self._sources.at(source)
        if not await self._store.reader.submit(place.store.exists, place.path):
            raise UnknownAdapterError(f"source {source!r} holds no adapter_config.json", "source")
        await self._store.registry.set_source(adapter_id, place.url)
        entry = self._store.names.add(adapter_id, place)
        if entry.location != place:
            entry.location, entry.stamp = place, None
        return entry, ""

    async def _newest(self, entry: KnownAdapter) -> Revision | None:
        """What the store holds now: a load that is under way may have read what it held before this was asked for."""
        if (under_way := entry.loads.get("")) is not None:
            await asyncio.wait([under_way])
        if await self._is_up_to_date(entry):
            return entry.current
        return await self._store.load(entry, "", again=True)

    async def _is_up_to_date(self, entry: KnownAdapter) -> bool:
        if entry.resident is None or entry.failure is not None:
            return False
        return await self._store.reader.submit(entry.location.store.etag, entry.location.path) == entry.stamp

    async def _is_adapter(self, name: str) -> bool:
        if self._store.names.cached(name) is not None:
            return True
        return await self._store.reader.submit(self._sources.find, name) is not None

    async def _pin(self, pinned: KnownAdapter | Revision, pin: bool) -> None:
        if isinstance(pinned, KnownAdapter):
            pinned.pinned = pin
        else:
            pinned.pinned_itself = pin
        name = pinned.id if isinstance(pinned, KnownAdapter) else str(pinned.revision_key)
        await self._store.registry.set_pin(name, pin)
        self._store.changes.notify(pinned.id if isinstance(pinned, KnownAdapter) else pinned.entry.id)

    async def _bring_back(self, pin: str) -> None:
        await self._store.release(await self._store.acquire(pin))


def _refuse_if_used(entry: KnownAdapter, prefix: str, versions: list[Revision]) -> None:
    residents = [resident for resident in entry.residents if resident.revision.startswith(prefix)]
    num_running = sum(resident.num_leases for resident in residents)
    num_waiting = sum(version.num_waiting for version in versions) if prefix else entry.num_waiting
    if num_running or num_waiting:
        raise AdapterInUseError(
            f"adapter {entry.id!r} has {num_running} requests running and {num_waiting} waiting; unload it later, or "
            "wait for them, or cancel them",
            "adapter_id",
        )


def _cancel_requests(residents: list[LoadedRevision]) -> None:
    for resident in residents:
        for end in list(resident.cancel_callbacks):
            end(
                AdapterUnloadedError(f"adapter {resident.id!r} was unloaded by an administrator; it may be asked again")
            )
