"""What names mean: the adapters a server knows, found in its stores, forgotten when they are gone.

A name is an id (the content of its store now), "id@revision" (that one, wherever it is kept) or an alias (an exact
revision too). Everything here runs in the service's event loop; stores are asked in threads (adapter_reading.py).
"""

import logging
import time

from quiver_server.adapters.entry import KnownAdapter
from quiver_server.adapters.loader import AdapterLoader
from quiver_server.adapters.registry import Registry
from quiver_server.adapters.revision import parse_name
from quiver_server.adapters.sources import AdapterSources, StoreLocation
from quiver_server.adapters.watch import ChangeFeed
from quiver_server.errors import RequestError, StoreUnavailableError, UnknownAdapterError

log = logging.getLogger(__name__)

_MISSED_SECONDS = 1.0  # how long an id that no store has is not looked for again
_MAX_MISSED = 10_000


class AdapterCatalog:
    """Names to entries."""

    def __init__(self, sources: AdapterSources, registry: Registry, reader: AdapterLoader, changes: ChangeFeed) -> None:
        self.registry = registry
        self.changes = changes
        self._sources = sources
        self._loader = reader
        self._entries: dict[str, KnownAdapter] = {}
        self._missed: dict[str, float] = {}  # ids that no store has: until when that is believed
        for adapter_id, source in self.registry.state.sources.items():
            try:
                self.add(adapter_id, self._sources.at(source))
            except RequestError as error:
                log.error("the adapter %s cannot be found: %s", adapter_id, error)

    async def entries(self) -> list[KnownAdapter]:
        """Every adapter known now, in order of ids; new ones are found here, and those that are gone forgotten."""
        try:
            for adapter_id, place in (await self._loader.submit(self._sources.locations)).items():
                self.add(adapter_id, place)
            for entry in list(self._entries.values()):
                await self._is_there(entry)
        except StoreUnavailableError as error:
            log.warning("the list of adapters may lack some: %s", error)
        return sorted(self._entries.values(), key=lambda entry: entry.id)

    @property
    def known(self) -> tuple[KnownAdapter, ...]:
        """Every adapter that was found so far. Callable from any thread."""
        return tuple(self._entries.values())

    def cached(self, adapter_id: str) -> KnownAdapter | None:
        """An entry as it is, without asking a store."""
        return self._entries.get(adapter_id)

    async def lookup(self, name: str) -> tuple[KnownAdapter, str]:
        """The entry of a name, and the beginning of the revision that it means, "" for the current one.

        Raises InvalidRequestError (malformed), UnknownAdapterError or StoreUnavailableError.
        """
        adapter_id, prefix = parse_name(name)
        if (exact := self.registry.state.aliases.get(adapter_id)) is not None and not prefix:
            adapter_id, prefix = exact
        entry = self._entries.get(adapter_id)
        if entry is None and (place := await self._locate(adapter_id)) is not None:
            entry = self.add(adapter_id, place)
        if entry is None:
            raise _unknown(adapter_id)
        return entry, prefix

    async def require(self, name: str) -> KnownAdapter:
        """The entry of a name whose adapter is there or in use. Raises as `find` does."""
        entry, _ = await self.lookup(name)
        try:
            is_there = await self._is_there(entry)
        except StoreUnavailableError:
            return entry
        if not is_there:
            raise _unknown(entry.id)
        return entry

    def add(self, adapter_id: str, place: StoreLocation) -> KnownAdapter:
        """Know an adapter, and its revisions that are kept on disk. One that is known stays as it is."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            entry = self._entries[adapter_id] = KnownAdapter(adapter_id, place)
            decided = self.registry.state
            entry.pinned = adapter_id in decided.pins
            for revision in self._loader.disk.revisions(adapter_id):
                version = entry.add_revision(revision)
                version.pinned_itself = str(version.revision_key) in decided.pins
            self.changes.notify(adapter_id)
        return entry

    async def _locate(self, adapter_id: str) -> StoreLocation | None:
        now = time.monotonic()
        if self._missed.get(adapter_id, now) > now:
            return None
        place = await self._loader.submit(self._sources.find, adapter_id, self._is_expected(adapter_id))
        if place is None and self._sources.any_is_remote:
            if len(self._missed) >= _MAX_MISSED:
                self._missed.clear()
            self._missed[adapter_id] = now + _MISSED_SECONDS
        return place

    def _is_expected(self, adapter_id: str) -> bool:
        """Whether an alias or a pin names it: it is served though the store has lost it."""
        decided = self.registry.state
        named = {*(exact.id for exact in decided.aliases.values()), *(pin.partition("@")[0] for pin in decided.pins)}
        return adapter_id in named and bool(self._loader.disk.revisions(adapter_id))

    async def _is_there(self, entry: KnownAdapter) -> bool:
        """Whether an adapter is in its store or in use; otherwise it is forgotten. Raises StoreUnavailableError."""
        if entry.residents or entry.loads or entry.waiting or self._is_expected(entry.id):
            return True
        if await self._loader.submit(entry.location.store.exists, entry.location.path):
            return True
        if not (entry.residents or entry.loads or entry.waiting) and self._entries.get(entry.id) is entry:
            del self._entries[entry.id]
            self.changes.notify(entry.id)
        return False


def _unknown(adapter_id: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"no adapter has the id {adapter_id!r}; ListAdapters names them all", "adapter_id")
