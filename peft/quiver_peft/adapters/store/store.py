"""A store of adapters: <root>/<adapter id>/ holds one, in a folder of this machine or at a URL. Written whole.

In a folder that is the adapter's own folder, which one rename replaces. Where there is no rename, as in S3,

    <id>/<revision>/adapter_config.json, ...   the files, which never change
    <id>/<revision>/manifest.json              names them with their digests: written after them
    <id>/manifest.json                         a copy of the current revision's: written last

so that readers see the old revision or the new one, and old ones stay. Both forms are read in either kind of store; an
adapter that was merely copied to a URL, without a manifest, too.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from quiver_peft.adapters.formats.adapter_files import (
    CONFIG_FILE,
    QUIVER_FILE,
    READ_FILES,
    AdapterFiles,
    missing,
    revision_of,
    weights_file,
)
from quiver_peft.adapters.store.files import LocalFiles, RemoteFiles, Stamp, StoreFiles, open_files
from quiver_peft.errors import AdapterError, StoreUrlError
from quiver_peft.files.atomic_folder import replace_folder
from quiver_peft.files.json_files import JsonError, parse_json

ADAPTER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
REVISION = re.compile(r"[0-9a-f]{64}")
MANIFEST_FILE = "manifest.json"
_SCHEMA_VERSION = 1
_TRIES = 3  # of reading what is being replaced


class AdapterStore:
    """Reads adapters below one root. Paths are an id, or names joined by "/" below the root."""

    def __init__(self, place: str) -> None:
        """place: a folder or a URL. Raises StoreError."""
        self.files: StoreFiles = open_files(place)
        self.url = self.files.url

    def ids(self) -> list[str]:
        """Of every adapter that can be listed; a web server without listings has others. Raises StoreError."""
        names = [name for name in self.files.names("")[1] if ADAPTER_ID.fullmatch(name)]
        if isinstance(self.files, LocalFiles):
            names = [name for name in names if self.exists(name)]
        return sorted(names)

    def exists(self, path: str) -> bool:
        """Whether an adapter is there. Raises StoreError."""
        return any(self.files.stamp(f"{path}/{name}") is not None for name in (CONFIG_FILE, MANIFEST_FILE))

    def etag(self, path: str) -> Stamp | None:
        """What tells that an adapter was replaced; None: there is none. Raises StoreError."""
        looked = self._find_adapter(path)
        return None if looked is None else tuple(looked.items())

    def fetch(self, path: str) -> tuple[Stamp, AdapterFiles]:
        """The current revision, as a whole, and its stamp. Raises AdapterError; StoreError; FileNotFoundError."""
        for _ in range(_TRIES):
            looked = self._find_adapter(path)
            if looked is None:
                raise FileNotFoundError(f"{self.url}/{path}: holds no {CONFIG_FILE}")
            try:
                if MANIFEST_FILE in looked:
                    return tuple(looked.items()), self._read_current(path)
                files = self._read_folder(path, list(looked))
            except FileNotFoundError:
                continue
            if self._find_adapter(path) == looked:
                return tuple(looked.items()), files
        raise AdapterError(
            f"{self.url}/{path}: each time that it was read it was replaced, or lacked a file that {MANIFEST_FILE} "
            "names; put it there by a rename, or with `quiver publish`"
        )

    def fetch_revision(self, path: str, prefix: str) -> AdapterFiles | None:
        """A revision by its first digits, where the store keeps old ones. Raises AdapterError; StoreError."""
        names = [prefix] if REVISION.fullmatch(prefix) else self.files.names(path)[1]
        found = [name for name in names if REVISION.fullmatch(name) and name.startswith(prefix)]
        if len(found) > 1:
            raise AdapterError(f"{self.url}/{path}: {len(found)} revisions begin with {prefix}; give more digits")
        try:
            return (
                self._read_manifest_files(path, self.files.read(f"{path}/{found[0]}/{MANIFEST_FILE}"))
                if found
                else None
            )
        except FileNotFoundError:
            return None

    def _find_adapter(self, path: str) -> dict[str, Stamp] | None:
        """The stamps of the manifest or, without one, of the files that are there."""
        if (manifest := self.files.stamp(f"{path}/{MANIFEST_FILE}")) is not None:
            return {MANIFEST_FILE: manifest}
        if (config := self.files.stamp(f"{path}/{CONFIG_FILE}")) is None:
            return None
        others = {name: self.files.stamp(f"{path}/{name}") for name in READ_FILES if name != CONFIG_FILE}
        return {CONFIG_FILE: config, **{name: stamp for name, stamp in others.items() if stamp is not None}}

    def _read_current(self, path: str) -> AdapterFiles:
        return self._read_manifest_files(path, self.files.read(f"{path}/{MANIFEST_FILE}"))

    def _read_folder(self, path: str, present: list[str]) -> AdapterFiles:
        folder = f"{self.url}/{path}"
        weights_name = weights_file(folder, present)
        if weights_name not in present:
            weights_file(folder, self.files.names(path)[0])  # says so where there is a pickle
            raise missing(f"{folder}/{weights_name}")
        config, weights = self.files.read(f"{path}/{CONFIG_FILE}"), self.files.read(f"{path}/{weights_name}")
        record = self.files.read(f"{path}/{QUIVER_FILE}") if QUIVER_FILE in present else None
        return AdapterFiles(folder, config, weights_name, weights, record)

    def _read_manifest_files(self, path: str, manifest: bytes) -> AdapterFiles:
        revision, listed = _parse_manifest(f"{self.url}/{path}/{MANIFEST_FILE}", manifest)
        folder = f"{path}/{revision}"
        content: dict[str, bytes] = {}
        for name in READ_FILES:
            if name in listed:
                content[name] = self.files.read(f"{folder}/{name}")
                if _sha256(content[name]) != listed[name]:
                    raise AdapterError(f"{self.url}/{folder}/{name}: is not the file that {MANIFEST_FILE} names")
        weights_name = weights_file(f"{self.url}/{folder}", list(content))
        if weights_name not in content or CONFIG_FILE not in content:
            raise missing(f"{self.url}/{folder}/{weights_name}")
        config, weights = content[CONFIG_FILE], content[weights_name]
        if revision_of(config, weights) != revision:
            raise AdapterError(f"{self.url}/{folder}: {MANIFEST_FILE} names another revision than its files make")
        return AdapterFiles(f"{self.url}/{folder}", config, weights_name, weights, content.get(QUIVER_FILE))


def publish(folder: Path, store: AdapterStore, adapter_id: str) -> str:
    """Put an adapter's folder into a store under an id, in place of what was there; returns its revision.

    Readers see the old one or the new one, never half; after a crash too. Raises AdapterError; StoreError.
    """
    if not ADAPTER_ID.fullmatch(adapter_id):
        raise AdapterError(
            f"adapter id {adapter_id!r}: must be 1 to 128 letters, digits, '.', '_', '-', not first a '.'"
        )
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    content = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    weights_name = weights_file(str(folder), list(content))
    for name in (CONFIG_FILE, weights_name):
        if name not in content:
            raise missing(f"{folder}/{name}")
    revision = revision_of(content[CONFIG_FILE], content[weights_name])
    files = store.files
    if isinstance(files, LocalFiles):
        replace_folder(files.root / adapter_id, content)
        return revision
    if not isinstance(files, RemoteFiles) or not files.url.startswith(("s3://", "gs://")):
        raise StoreUrlError(f"{files.url}: adapters are published to folders, s3:// and gs://")
    for name, data in content.items():
        files.write(f"{adapter_id}/{revision}/{name}", data)
    manifest = _write_manifest(revision, content)
    files.write(f"{adapter_id}/{revision}/{MANIFEST_FILE}", manifest)
    files.write(f"{adapter_id}/{MANIFEST_FILE}", manifest)
    return revision


def _write_manifest(revision: str, content: Mapping[str, bytes]) -> bytes:
    files = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in content.items()}
    manifest = {"schema_version": _SCHEMA_VERSION, "revision": revision, "files": files}
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _parse_manifest(path: str, data: bytes) -> tuple[str, dict[str, str]]:
    """The revision, and the digests of its files by name. Raises AdapterError."""
    try:
        manifest = parse_json(data, path)
        version, revision = manifest["schema_version"], manifest["revision"]
        files = {str(name): str(item["sha256"]) for name, item in manifest["files"].items()}
    except (JsonError, KeyError, TypeError, AttributeError):
        raise AdapterError(f"{path}: not a manifest: schema_version, revision, files") from None
    if version != _SCHEMA_VERSION:
        raise AdapterError(f"{path}: schema_version {version!r} is not known; this is {_SCHEMA_VERSION}")
    if not isinstance(revision, str) or not REVISION.fullmatch(revision):
        raise AdapterError(f"{path}: revision {revision!r} must be 64 hexadecimal digits")
    return revision, files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
