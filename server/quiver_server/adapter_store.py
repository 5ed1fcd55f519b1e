"""The adapters a server knows: found in a folder, loaded at first use beside the step loop, given back when unused.

Everything here runs in the service's event loop, except reading and placing an adapter, which happens in one thread.
"""

import asyncio
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quiver_peft.adapters.artifact import CONFIG_FILE
from quiver_peft.adapters.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.errors import AdapterError, BaseMismatchError
from quiver_server.adapter_entry import ADAPTER_ID, Entry, Resident, State, files_state
from quiver_server.errors import (
    AdapterTooLargeError,
    BusyError,
    DrainingError,
    InvalidRequestError,
    MalformedAdapterError,
    OtherBaseError,
    RequestError,
    UnknownAdapterError,
)
from quiver_server.metrics import Metrics

_REVISION = re.compile(r"[0-9a-f]{6,64}")
_PATIENCE_SECONDS = 60.0  # how long a request waits for memory that other adapters' requests hold


class AdapterStore:
    """Ids to residents. `read`: reads and validates a folder (blocking); raises AdapterError."""

    def __init__(
        self, root: Path, banks: AdapterBanks, read: Callable[[Path], AdapterWeights], metrics: Metrics
    ) -> None:
        self.root = root.resolve()
        self._banks = banks
        self._read = read
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        self._released = asyncio.Condition()
        self._placing = asyncio.Lock()  # two that look for room at once would evict it from under each other
        self._num_leases = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")

    def close(self) -> None:
        """Wait for a load under way and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

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

    async def acquire(self, name: str) -> Resident:
        """A lease on the adapter of "id" or "id@revision", loading it if need be. Give it back with `release`."""
        adapter_id, at, revision = name.partition("@")
        if at and not _REVISION.fullmatch(revision):
            raise InvalidRequestError(f"revision {revision!r} is malformed: 6 to 64 hexadecimal digits", "adapter_id")
        entry = self.find(adapter_id)
        entry.num_waiting += 1
        try:
            # Looked at again after each wait: what was loaded may have given way before this task went on.
            while (resident := entry.resident) is None:
                await self._load(entry)
        finally:
            entry.num_waiting -= 1
        if not resident.revision.startswith(revision):
            raise UnknownAdapterError(
                f"adapter {adapter_id!r} has the revision {resident.revision[:12]}, not {revision}", "adapter_id"
            )
        resident.num_leases += 1
        self._num_leases += 1
        entry.last_used_seconds = time.monotonic()
        return resident

    async def release(self, resident: Resident) -> None:
        """A request that used this adapter has ended."""
        resident.num_leases -= 1
        self._num_leases -= 1
        if resident.retired and not resident.num_leases:
            self._free(resident)
        async with self._released:
            self._released.notify_all()

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
        self._retire(resident)
        await resident.gone.wait()
        return resident.num_bytes

    def _register(self, adapter_id: str, source: str) -> Entry:
        if not ADAPTER_ID.fullmatch(adapter_id):
            self.find(adapter_id)
        folder = (self.root / source).resolve()
        if "://" in source or not folder.is_relative_to(self.root):
            raise InvalidRequestError(
                f"source {source!r} is outside of the adapters folder, the only place this server loads from", "source"
            )
        if not (folder / CONFIG_FILE).is_file():
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
        previous, entry.resident, entry.failure = entry.resident, resident, None
        if previous is not None:
            self._retire(previous)
        self._observe()
        return resident

    async def _read_and_place(self, entry: Entry) -> Resident:
        loop = asyncio.get_running_loop()
        try:
            weights = await loop.run_in_executor(self._thread, self._read, entry.folder)
        except BaseMismatchError as error:
            raise OtherBaseError(f"adapter {entry.id!r}: {error}", "adapter_id") from None
        except AdapterError as error:
            raise MalformedAdapterError(f"adapter {entry.id!r}: {error}", "adapter_id") from None
        self._check_size(entry, weights)
        async with self._placing:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while (slot := await loop.run_in_executor(self._thread, self._banks.insert, weights)) is None:
                if not self._evict_one():
                    await self._wait_for_release(weights, deadline)
        return Resident(
            entry.id,
            weights.revision,
            weights.methods,
            slot,
            self._banks.num_bytes(weights),
            num_parameters=weights.num_parameters,
            max_rank=weights.max_rank,
            num_prefix_tokens=weights.num_prefix_tokens,
            num_prompt_tokens=weights.num_prompt_tokens,
        )

    def _check_size(self, entry: Entry, weights: AdapterWeights) -> None:
        """Refuse for good, and evict nobody for, what could never be placed. Raises AdapterTooLargeError."""
        needed, capacity = self._banks.num_bytes(weights), self._banks.capacity_bytes
        if needed > capacity:
            raise AdapterTooLargeError(
                f"adapter {entry.id!r} needs {needed} bytes; the whole adapter memory of this server has {capacity} "
                "(--adapter-memory-mib)",
                "adapter_id",
            )

    async def _wait_for_release(self, weights: AdapterWeights, deadline: float) -> None:
        """Nothing can be evicted now: wait until some request ends. Raises BusyError when that takes too long."""
        needed = self._banks.num_bytes(weights)
        busy = BusyError(f"no adapter memory for {needed} bytes: all resident adapters are pinned or in use")
        if not self._num_leases:
            raise busy
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)), self._released:
                await self._released.wait()
        except TimeoutError:
            raise busy from None

    def _evict_one(self) -> bool:
        """The least recently used adapter that nobody needs gives way; False when there is none."""
        idle = [
            entry
            for entry in self._entries.values()
            if entry.resident is not None and not entry.resident.num_leases and not entry.pinned
        ]
        if not idle:
            return False
        entry = min(idle, key=lambda entry: entry.last_used_seconds)
        resident, entry.resident = entry.resident, None
        if resident is not None:
            self._retire(resident)
        self._metrics.adapter_evictions.inc()
        return True

    def _retire(self, resident: Resident) -> None:
        resident.retired = True
        if not resident.num_leases:
            self._free(resident)

    def _free(self, resident: Resident) -> None:
        assert resident.slot != BASE_SLOT
        self._banks.remove(resident.slot)
        resident.gone.set()
        self._observe()

    def _observe(self) -> None:
        self._metrics.resident_adapters.set(sum(entry.resident is not None for entry in self._entries.values()))
        self._metrics.adapter_free_bytes.set(self._banks.free_bytes)
