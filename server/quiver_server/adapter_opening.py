"""Puts the adapter store together from its parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from quiver_peft.adapters.adapter_files import AdapterFiles
from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapter_admin import AdapterAdmin
from quiver_server.adapter_memory import AdapterMemory
from quiver_server.adapter_names import AdapterNames
from quiver_server.adapter_reading import AdapterReader
from quiver_server.adapter_sources import AdapterSources
from quiver_server.adapter_store import AdapterStore
from quiver_server.adapter_watch import Changes
from quiver_server.background import background_threads
from quiver_server.disk_cache import DiskCache
from quiver_server.metrics import Metrics
from quiver_server.registry import Registry
from quiver_server.weights_cache import WeightsCache


def open_adapters(
    roots: Sequence[str],
    state: Path | None,
    banks: AdapterBanks,
    parse: Callable[[AdapterFiles], AdapterWeights],
    metrics: Metrics,
    *,
    host_bytes: int,
    disk_bytes: int,
) -> tuple[AdapterStore, AdapterAdmin]:
    """The store of these roots, and what changes it. Raises QuiverError, such as when another server has the state."""
    sources = AdapterSources(roots)
    registry = Registry(state)
    disk = DiskCache(registry.folder / "cache", disk_bytes, lambda exact: registry.decided.names(exact))
    thread = background_threads(1, "adapter-loader")
    changes = Changes()
    reader = AdapterReader(parse, WeightsCache(host_bytes), disk, thread)
    memory = AdapterMemory(banks, thread, metrics, changes.note)
    names = AdapterNames(sources, registry, reader, changes)
    store = AdapterStore(names, reader, memory, thread, metrics)
    return store, AdapterAdmin(store, sources)
