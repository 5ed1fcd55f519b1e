"""Puts the adapter store together from its parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from quiver_peft.adapters.formats.adapter_files import AdapterFiles
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_server.adapters.admin import AdapterAdmin
from quiver_server.adapters.background_threads import background_threads
from quiver_server.adapters.catalog import AdapterCatalog
from quiver_server.adapters.disk_cache import DiskCache
from quiver_server.adapters.host_cache import HostCache
from quiver_server.adapters.loader import AdapterLoader
from quiver_server.adapters.manager import AdapterManager
from quiver_server.adapters.memory import AdapterMemory
from quiver_server.adapters.registry import Registry
from quiver_server.adapters.sources import AdapterSources
from quiver_server.adapters.watch import ChangeFeed
from quiver_server.telemetry.metrics import Metrics


def open_adapters(
    roots: Sequence[str],
    state: Path | None,
    banks: AdapterBanks,
    parse: Callable[[AdapterFiles], AdapterWeights],
    metrics: Metrics,
    *,
    host_bytes: int,
    disk_bytes: int,
) -> tuple[AdapterManager, AdapterAdmin]:
    """The store of these roots, and what changes it. Raises QuiverError, such as when another server has the state."""
    sources = AdapterSources(roots)
    registry = Registry(state)
    disk = DiskCache(registry.folder / "cache", disk_bytes, lambda exact: registry.state.names(exact))
    thread = background_threads(1, "adapter-loader")
    changes = ChangeFeed()
    reader = AdapterLoader(parse, HostCache(host_bytes), disk, thread)
    memory = AdapterMemory(banks, thread, metrics, changes.notify)
    names = AdapterCatalog(sources, registry, reader, changes)
    store = AdapterManager(names, reader, memory, thread, metrics)
    return store, AdapterAdmin(store, sources)
