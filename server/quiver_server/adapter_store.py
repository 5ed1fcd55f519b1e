"""The adapters a server knows: found in a folder, loaded at first use beside the step loop, given back when unused.

A load begins when the first request for it arrives. Everything here runs in the service's event loop, except reading
an adapter, and copying it into the banks, which happens in one thread.
"""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quiver_peft.adapters.adapter_files import CONFIG_FILE
from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.errors import AdapterError, BaseMismatchError
from quiver_server.adapter_entry import ADAPTER_ID, Entry, Resident, State, files_state
from quiver_server.adapter_memory import AdapterMemory
from quiver_server.errors import (
    BusyError,
    DrainingError,
    InvalidRequestError,
    MalformedAdapterError,
    OtherBaseError,
    RequestError,
    UnknownAdapterError,
)
from quiver_server.metrics import Metrics
from quiver_server.weights_cache import WeightsCache

_REVISION = re.compile(r"[0-9a-f]{6,64}")


class AdapterStore:
    """Ids to residents."""

    def __init__(self, root: Path, banks: AdapterBanks, weights: WeightsCache, metrics: Metrics) -> None:
        self.root = root.resolve()
        self.weights = weights
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self.memory = AdapterMemory(banks, self._thread, metrics)

    def close(self) -> None:
        """Wait for a load under way and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def known(self) -> tuple[Entry, ...]:
        """Every adapter that was found so far. Callable from any thread."""
        return tuple(self._entries.values())

    def entries(self) -> list[Entry]:
        """Every adapter known now, in order of ids; new folders are found here."""
        if self.root.is_dir():
            for folder in self.root.iterdir():
                if ADAPTER_ID.fullmatch(folder.name) and (folder / CONFIG_FILE).is_file():
                    self._entries.setdefault(folder.name, Entry(folder.name, folder))
        for entry in list(self._entries.values()):
            if entry.state in (State.REGISTERED, State.FAILED) and not (entry.folder / CONFIG_FILE).is_file():
                del self._entries[entry.id]
        return sorted(self._entries.values(), key=lambda entry: entry.id)

    def find(self, adapter_id: str) -> Entry:
        """The entry of an id. Raises InvalidRequestError (malformed) or UnknownAdapterError."""
        if not ADAPTER_ID.fullmatch(adapter_id):
            raise InvalidRequestError(
                f"adapter_id {adapter_id!r} is malformed: 1 to 128 letters, digits, '.', '_', '-', not first a '.'",
                "adapter_id",
            )
        folder = self.root / adapter_id
        entry = self._entries.get(adapter_id)
        if entry is None and (folder / CONFIG_FILE).is_file():
            entry = self._entries.setdefault(adapter_id, Entry(adapter_id, folder))
        if entry is None or (entry.resident is None and not entry.folder.is_dir()):
            raise UnknownAdapterError(
                f"no adapter has the id {adapter_id!r}; ListAdapters names them all", "adapter_id"
            )
        return entry

    def host_bytes(self, entry: Entry) -> int:
        """Main memory that keeps an adapter's weights for the next time that it is loaded."""
        return self.weights.bytes_of(entry.folder)

    async def acquire(self, name: str) -> Resident:
        """A lease on the adapter of "id" or "id@revision", loading it if need be. Give it back with `release`."""
        adapter_id, at, revision = name.partition("@")
        if at and not _REVISION.fullmatch(revision):
            raise InvalidRequestError(f"revision {revision!r} is malformed: 6 to 64 hexadecimal digits", "adapter_id")
        entry = self.find(adapter_id)
        entry.num_waiting += 1
        try:
            # Looked at again after each wait: what was loaded may have given way before this task went on.
            while (resident := entry.resident) is None or entry.draining:
                if resident is None:
                    await self._load(entry)
                else:
                    await self.memory.changed(self.memory.num_changes)
        finally:
            entry.num_waiting -= 1
        if not resident.revision.startswith(revision):
            raise UnknownAdapterError(
                f"adapter {adapter_id!r} has the revision {resident.revision[:12]}, not {revision}", "adapter_id"
            )
        self.memory.lease(resident)
        return resident

    async def release(self, resident: Resident) -> None:
        """A request that used this adapter has ended."""
        await self.memory.release(resident)

    async def load(self, adapter_id: str, source: str, pin: bool) -> Entry:
        """Bring an adapter, or its newer content, into memory. Running requests finish on what they started with."""
        entry = self._register(adapter_id, source) if source else self.find(adapter_id)
        was_pinned, entry.pinned = entry.pinned, entry.pinned or pin  # first: it could be evicted before this goes on
        try:
            if entry.resident is None or entry.seen != files_state(entry.folder):
                await self._load(entry, again=True)
        except RequestError:
            entry.pinned = was_pinned
            raise
        return entry

    async def unload(self, adapter_id: str) -> int:
        """Take an adapter out of memory once its last request has ended; returns the bytes given back."""
        entry = self.find(adapter_id)
        entry.pinned = False
        if entry.loading is not None:
            await asyncio.wait([entry.loading])
        resident, entry.resident = entry.resident, None
        if resident is None:
            return 0
        self.memory.retire(resident)
        await self.memory.notify()
        await resident.gone.wait()
        return resident.num_bytes

    def _register(self, adapter_id: str, source: str) -> Entry:
        if not ADAPTER_ID.fullmatch(adapter_id):
            self.find(adapter_id)
        try:
            folder = (self.root / source).resolve()
            is_there = (folder / CONFIG_FILE).is_file()
        except (OSError, ValueError):  # a name that is too long, or has a zero byte
            raise InvalidRequestError(f"source is no path: {source!r}", "source") from None
        if "://" in source or not folder.is_relative_to(self.root):
            raise InvalidRequestError(
                f"source {source!r} is outside of the adapters folder, the only place this server loads from", "source"
            )
        if not is_there:
            raise UnknownAdapterError(f"source {source!r} holds no {CONFIG_FILE}", "source")
        entry = self._entries.setdefault(adapter_id, Entry(adapter_id, folder))
        entry.folder = folder
        return entry

    async def _load(self, entry: Entry, *, again: bool = False) -> Resident:
        """Load once, however many wait for it; a folder that failed is tried again only when its files have changed."""
        if entry.loading is None:
            if entry.failure is not None and not again and entry.seen == files_state(entry.folder):
                raise entry.failure
            entry.loading = asyncio.create_task(self._load_now(entry))
        # Shielded: the load belongs to all who wait for it, not to the client that happened to ask first.
        return await asyncio.shield(entry.loading)

    async def _load_now(self, entry: Entry) -> Resident:
        started = time.monotonic()
        entry.seen = files_state(entry.folder)
        try:
            resident = await self._read_and_place(entry)
        except RequestError as error:
            self._metrics.adapter_loads.labels("failed").inc()
            entry.failure = None if isinstance(error, BusyError | DrainingError) else error
            raise
        finally:
            entry.loading = None
        self._metrics.adapter_loads.labels("ok").inc()
        self._metrics.adapter_load_seconds.observe(time.monotonic() - started)
        entry.failure = None
        return resident

    async def _read_and_place(self, entry: Entry) -> Resident:
        started = time.monotonic()
        try:
            read = asyncio.get_running_loop().run_in_executor(self._thread, self.weights.read, entry.folder)
            weights = await read
        except BaseMismatchError as error:
            raise OtherBaseError(f"adapter {entry.id!r}: {error}", "adapter_id") from None
        except AdapterError as error:
            raise MalformedAdapterError(f"adapter {entry.id!r}: {error}", "adapter_id") from None
        self.memory.check_size(entry, weights)
        is_kept = self.weights.bytes_of(entry.folder) > 0
        return await self.memory.place(entry, weights, 0.0 if is_kept else time.monotonic() - started)
