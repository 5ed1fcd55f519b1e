"""What was decided about adapters and must survive a restart: aliases, pins and sources, in one file, for one process.

The file is replaced by a rename after it was flushed: killed at any moment, there is the old state or the new one. A
change counts, and is answered, once it is on the disk.
"""

import asyncio
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quiver_peft.adapters.store.store import ADAPTER_ID, REVISION
from quiver_peft.errors import QuiverError
from quiver_peft.files.atomic_folder import sync_folder
from quiver_peft.files.json_files import JsonError, read_json
from quiver_server.adapters.revision import RevisionKey
from quiver_server.errors import RequestError

REGISTRY_FILE = "registry.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RegistryState:
    """aliases: name to revision. pins: ids and "id@revision"s. sources: id to the place below an allowed root."""

    aliases: Mapping[str, RevisionKey] = field(default_factory=dict[str, RevisionKey])
    pins: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict[str, str])

    def names(self, exact: RevisionKey) -> bool:
        """Whether an alias or a pin names this revision."""
        return str(exact) in self.pins or exact in self.aliases.values()


class Registry:
    """The state folder of one server, or with None a folder that ends with the process."""

    def __init__(self, folder: Path | None) -> None:
        """Raises QuiverError: another server uses the folder, or its file is not a registry."""
        self._temporary = tempfile.TemporaryDirectory(prefix="quiver-") if folder is None else None
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(self.folder)
        self._file = self.folder / REGISTRY_FILE
        self._changing = asyncio.Lock()
        self.state = _read(self._file)

    def close(self) -> None:
        """Another server may have the folder now."""
        os.close(self._lock_file)
        if self._temporary is not None:
            self._temporary.cleanup()

    async def set_alias(self, name: str, exact: RevisionKey | None) -> RevisionKey | None:
        """Move an alias, or with None take it away; returns what it named. Raises RequestError."""
        async with self._changing:
            aliases = {key: value for key, value in self.state.aliases.items() if key != name}
            if exact is not None:
                aliases[name] = exact
            previous = self.state.aliases.get(name)
            await self._change(replace(self.state, aliases=aliases))
            return previous

    async def set_pin(self, name: str, pinned: bool) -> None:
        """Pin or unpin an id or "id@revision". Raises RequestError."""
        async with self._changing:
            pins = self.state.pins - {name}
            await self._change(replace(self.state, pins=pins | {name} if pinned else pins))

    async def set_source(self, adapter_id: str, source: str) -> None:
        """Where an id is read from. Raises RequestError."""
        async with self._changing:
            await self._change(replace(self.state, sources={**self.state.sources, adapter_id: source}))

    async def _change(self, decided: RegistryState) -> None:
        if decided != self.state:
            try:
                await asyncio.to_thread(_write, self._file, decided)
            except OSError as error:
                raise RequestError(f"nothing has changed, {self._file} cannot be written: {error}") from None
            self.state = decided


def _lock(folder: Path) -> int:
    """Held until it is closed, or the process ends however it ends."""
    path = folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 20).decode().strip()
        os.close(descriptor)
        raise QuiverError(
            f"--state {folder}: another server uses it (process {owner or 'unknown'}); each server needs its own, "
            "the stores of adapters may be shared"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _read(path: Path) -> RegistryState:
    try:
        content = read_json(path)
    except FileNotFoundError:
        return RegistryState()
    except JsonError as error:
        raise QuiverError(f"{error}; mend it, or move it away to begin anew") from None
    try:
        version = content["schema_version"]
        aliases = {str(name): _read_revision_key(text) for name, text in content["aliases"].items()}
        sources = {str(name): str(source) for name, source in content["sources"].items()}
        decided = RegistryState(aliases, frozenset(str(pin) for pin in content["pins"]), sources)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise QuiverError(f"{path}: not a registry: schema_version, aliases, pins, sources") from None
    if version != _SCHEMA_VERSION:
        raise QuiverError(f"{path}: schema_version {version!r} is not known; this is {_SCHEMA_VERSION}")
    for name in (*aliases, *sources, *(pin.partition("@")[0] for pin in decided.pins)):
        if not ADAPTER_ID.fullmatch(name):
            raise QuiverError(f"{path}: {name!r} cannot be an adapter's id")
    return decided


def _read_revision_key(text: Any) -> RevisionKey:
    adapter_id, _, revision = str(text).partition("@")
    if not ADAPTER_ID.fullmatch(adapter_id) or not REVISION.fullmatch(revision):
        raise ValueError(text)
    return RevisionKey(adapter_id, revision)


def _write(path: Path, decided: RegistryState) -> None:
    content = {
        "schema_version": _SCHEMA_VERSION,
        "aliases": {name: str(exact) for name, exact in sorted(decided.aliases.items())},
        "pins": sorted(decided.pins),
        "sources": dict(sorted(decided.sources.items())),
    }
    staging = path.with_name(f".{path.name}")
    with staging.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(path)
    sync_folder(path.parent)
