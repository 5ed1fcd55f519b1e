"""Where this server may read adapters from: the stores of --adapters, and paths below them. All of it may block."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quiver_peft.adapters.store.files import LocalFiles, is_url
from quiver_peft.adapters.store.store import ADAPTER_ID, AdapterStore
from quiver_peft.errors import StoreError
from quiver_server.errors import InvalidRequestError

_MAX_SOURCE_LENGTH = 1024


class StoreLocation(NamedTuple):
    """An adapter's place in a store."""

    store: AdapterStore
    path: str

    @property
    def url(self) -> str:
        """As people know it."""
        return f"{self.store.url}/{self.path}"


class AdapterSources:
    """The stores, in the order of their precedence: an id that several have is the first one's."""

    def __init__(self, roots: Sequence[str]) -> None:
        """roots: folders and URLs, at least one. Raises StoreError."""
        self._stores = [AdapterStore(root) for root in roots]
        self.any_is_remote = any(not isinstance(store.files, LocalFiles) for store in self._stores)

    def find(self, adapter_id: str, expected: bool = False) -> StoreLocation | None:
        """Where an id lies; where it is expected to, though a store does not answer or lacks it. Raises StoreError."""
        for store in self._stores:
            try:
                if store.exists(adapter_id):
                    return StoreLocation(store, adapter_id)
            except StoreError:
                if not expected:
                    raise
                return StoreLocation(store, adapter_id)
        return StoreLocation(self._stores[0], adapter_id) if expected else None

    def locations(self) -> dict[str, StoreLocation]:
        """By id, every adapter that can be listed. Raises StoreError."""
        found: dict[str, StoreLocation] = {}
        for store in self._stores:
            for adapter_id in store.ids():
                found.setdefault(adapter_id, StoreLocation(store, adapter_id))
        return found

    def at(self, source: str) -> StoreLocation:
        """The place that a caller names: a path below the first store, or one that begins with a store's own.

        Raises InvalidRequestError for whatever is not below one of them.
        """
        if len(source) > _MAX_SOURCE_LENGTH:
            raise InvalidRequestError(f"source is no path: it has {len(source)} characters", "source")
        for index, store in enumerate(self._stores):
            path = source.removeprefix(store.url).lstrip("/") if source.startswith(store.url + "/") else None
            if path is None and not index and not is_url(source) and not source.startswith("/"):
                path = source
            if path is not None and all(ADAPTER_ID.fullmatch(name) for name in path.split("/")):
                if isinstance(store.files, LocalFiles) and not _is_below(store.files.root, path):
                    break
                return StoreLocation(store, path)
        raise InvalidRequestError(
            f"source {source!r} is outside of what this server loads from: "
            f"{', '.join(store.url for store in self._stores)}",
            "source",
        )


def _is_below(root: Path, path: str) -> bool:
    """Links lead nowhere else."""
    return (root / path).resolve().is_relative_to(root)
