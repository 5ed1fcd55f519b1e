"""Reads adapters from where they are nearest: main memory, this server's disk, or the store; what was read is kept.

Stores are asked in threads of their own, so that one that is slow holds up no adapter that is near; reading the bytes
happens in the loader's one thread, beside the step loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from quiver_peft.adapters.formats.adapter_files import AdapterFiles
from quiver_peft.adapters.store.files import Stamp
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.errors import AdapterError, BaseMismatchError, StoreError
from quiver_server.adapters.background_threads import background_threads
from quiver_server.adapters.disk_cache import DiskCache
from quiver_server.adapters.host_cache import HostCache
from quiver_server.adapters.revision import RevisionKey
from quiver_server.adapters.sources import StoreLocation
from quiver_server.errors import MalformedAdapterError, OtherBaseError, StoreUnavailableError, UnknownAdapterError

log = logging.getLogger(__name__)

T = TypeVar("T")
_STORE_THREADS = 4


class AdapterLoader:
    """Lives in the event loop. parse: validates files for this server's base; raises AdapterError."""

    def __init__(
        self, parse: Callable[[AdapterFiles], AdapterWeights], host: HostCache, disk: DiskCache, thread: Executor
    ) -> None:
        self._parse = parse
        self.host = host
        self.disk = disk
        self._thread = thread
        self._store_threads = background_threads(_STORE_THREADS, "adapter-store")

    def close(self) -> None:
        """Nothing is asked any more; what is under way ends by itself."""
        self._store_threads.shutdown(wait=False, cancel_futures=True)

    async def submit(self, call: Callable[..., T], *arguments: object) -> T:
        """Call what may block on a store. Raises StoreUnavailableError, and whatever else it raises."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._store_threads, call, *arguments)
        except StoreError as error:
            raise StoreUnavailableError(str(error)) from None

    async def load_current(self, adapter_id: str, place: StoreLocation) -> tuple[Stamp, AdapterWeights]:
        """What the store holds now. Raises UnknownAdapterError, StoreUnavailableError, or what is wrong with it."""
        stamp, files = await self._valid(adapter_id, self.submit(_fetch, adapter_id, place))
        return stamp, await self._read(adapter_id, files, keep=True)

    async def load_revision(self, exact: RevisionKey, place: StoreLocation) -> AdapterWeights | None:
        """One revision, from the nearest place that has it; None: none has."""
        loop = asyncio.get_running_loop()
        if (weights := await loop.run_in_executor(self._thread, self.host.get, exact.revision)) is not None:
            return weights
        files = await loop.run_in_executor(self._store_threads, self.disk.get, exact)
        if files is not None:
            return await self._read(exact.id, files, keep=False)
        fetched = await self._valid(exact.id, self.submit(_fetch_revision, place, exact.revision))
        return None if fetched is None else await self._read(exact.id, fetched, keep=True)

    async def is_cached(self, exact: RevisionKey, place: StoreLocation) -> bool:
        """Whether the disk has a revision now, brought there if need be."""
        if self.disk.bytes_of(exact):
            return True
        files = await self._valid(exact.id, self.submit(_fetch_revision, place, exact.revision))
        return files is not None and await self.submit(self.disk.put, exact.id, files)

    async def find_revision(self, adapter_id: str, place: StoreLocation, prefix: str) -> str | None:
        """The revision that begins so, where the store keeps it or holds it now."""
        files = await self._valid(adapter_id, self.submit(_fetch_revision, place, prefix))
        return None if files is None else files.revision

    async def _read(self, adapter_id: str, files: AdapterFiles, *, keep: bool) -> AdapterWeights:
        loop = asyncio.get_running_loop()
        weights = await self._valid(adapter_id, loop.run_in_executor(self._thread, self._parse_and_hold, files))
        if keep:  # only what is valid: a disk full of refusals would hold nothing
            await loop.run_in_executor(self._store_threads, self.disk.put, adapter_id, files)
        return weights

    def _parse_and_hold(self, files: AdapterFiles) -> AdapterWeights:
        weights = self._parse(files)
        self.host.put(weights)
        return weights

    async def _valid(self, adapter_id: str, work: Awaitable[T]) -> T:
        try:
            return await work
        except BaseMismatchError as error:
            raise OtherBaseError(f"adapter {adapter_id!r}: {error}", "adapter_id") from None
        except AdapterError as error:
            raise MalformedAdapterError(f"adapter {adapter_id!r}: {error}", "adapter_id") from None


def _fetch(adapter_id: str, place: StoreLocation) -> tuple[Stamp, AdapterFiles]:
    try:
        return place.store.fetch(place.path)
    except FileNotFoundError:
        raise UnknownAdapterError(
            f"no adapter has the id {adapter_id!r} any more: nothing is at {place.url}", "adapter_id"
        ) from None


def _fetch_revision(place: StoreLocation, prefix: str) -> AdapterFiles | None:
    found = place.store.fetch_revision(place.path, prefix)
    if found is None:
        try:
            _, current = place.store.fetch(place.path)
        except FileNotFoundError:
            return None
        found = current if current.revision.startswith(prefix) else None
    return found
