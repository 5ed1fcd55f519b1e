"""Revisions of adapters on the server's own disk: <folder>/<id>/<revision>/, whole and verified or not there at all.

What an adapter's files are is what their digest says: a folder whose files do not make its name is thrown away. Each
is written beside its place, flushed and renamed. The least recently used go when the limit is reached, but for those
that must stay, which aliases and pins name.
"""

import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import RLock

from quiver_peft.adapters.formats.adapter_files import AdapterFiles, read_files
from quiver_peft.adapters.store.store import ADAPTER_ID, REVISION
from quiver_peft.errors import AdapterError
from quiver_peft.files.atomic_folder import replace_folder
from quiver_server.adapters.revision import RevisionKey

log = logging.getLogger(__name__)

_CURRENT = "current"  # a link to the revision that the id alone named last


class DiskCache:
    """A folder that this process alone writes. Threads may share it."""

    def __init__(self, folder: Path, capacity_bytes: int, must_stay: Callable[[RevisionKey], bool]) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._must_stay = must_stay
        self._lock = RLock()
        self._sizes: OrderedDict[RevisionKey, int] = OrderedDict()  # the least recently used first
        self.num_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._find()

    def get(self, exact: RevisionKey) -> AdapterFiles | None:
        """A revision's files, verified; None where it is not kept, or was damaged."""
        with self._lock:
            if exact not in self._sizes:
                return None
            try:
                files = read_files(self._path(exact))
            except AdapterError as error:
                log.warning("dropped from the cache: %s", error)
                self._drop(exact)
                return None
            if files.revision != exact.revision:
                log.warning("dropped from the cache: %s is damaged", self._path(exact))
                self._drop(exact)
                return None
            self._sizes.move_to_end(exact)
            os.utime(self._path(exact))
            return files

    def put(self, adapter_id: str, files: AdapterFiles) -> bool:
        """Keep a revision; False where there is no room beside those that must stay, or the disk is full."""
        exact, content = RevisionKey(adapter_id, files.revision), files.by_name
        num_bytes = sum(len(data) for data in content.values())
        with self._lock:
            if exact in self._sizes:
                return True
            if not self._make_room(num_bytes):
                return False
            try:
                replace_folder(self._path(exact), content)
            except OSError as error:
                log.warning("%s is not kept on disk: %s", exact, error)
                return False
            self._sizes[exact] = num_bytes
            self.num_bytes += num_bytes
            return True

    def bytes_of(self, exact: RevisionKey) -> int:
        """Disk that a revision takes."""
        return self._sizes.get(exact, 0)

    def revisions(self, adapter_id: str) -> list[str]:
        """Those of an adapter that are kept."""
        with self._lock:
            return sorted(exact.revision for exact in self._sizes if exact.id == adapter_id)

    def current(self, adapter_id: str) -> str | None:
        """What the id alone named last, in an earlier process too; None where that is not kept."""
        try:
            revision = (self._folder / adapter_id / _CURRENT).readlink().name
        except OSError:
            return None
        return revision if RevisionKey(adapter_id, revision) in self._sizes else None

    def set_current(self, exact: RevisionKey) -> None:
        """The id alone names this revision from now on."""
        link = self._folder / exact.id / _CURRENT
        if exact not in self._sizes or self.current(exact.id) == exact.revision:
            return
        staging = link.with_name(f".{_CURRENT}")
        try:
            staging.unlink(missing_ok=True)
            staging.symlink_to(exact.revision)
            staging.rename(link)
        except OSError as error:
            log.warning("%s is not noted on disk: %s", exact, error)

    def _find(self) -> None:
        """What an earlier process left; what it had not finished is removed."""
        found: list[tuple[float, RevisionKey, int]] = []
        for folder in (path for path in self._folder.iterdir() if ADAPTER_ID.fullmatch(path.name) and path.is_dir()):
            for path in folder.iterdir():
                if REVISION.fullmatch(path.name) and path.is_dir():
                    num_bytes = sum(file.stat().st_size for file in path.iterdir())
                    found.append((path.stat().st_mtime, RevisionKey(folder.name, path.name), num_bytes))
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
        for _, exact, num_bytes in sorted(found):
            self._sizes[exact] = num_bytes
            self.num_bytes += num_bytes
        self._make_room(0)

    def _make_room(self, num_bytes: int) -> bool:
        free = self._capacity_bytes - self.num_bytes
        going: list[RevisionKey] = []
        for exact, size in self._sizes.items():
            if free >= num_bytes:
                break
            if not self._must_stay(exact):
                going.append(exact)
                free += size
        if free < num_bytes:
            return False
        for exact in going:
            self._drop(exact)
        return True

    def _drop(self, exact: RevisionKey) -> None:
        """Out of sight by a rename first: a folder that is being removed is half a folder."""
        self.num_bytes -= self._sizes.pop(exact)
        path = self._path(exact)
        aside = path.with_name(f".{exact.revision}")
        try:
            path.rename(aside)
        except OSError:
            aside = path
        shutil.rmtree(aside, ignore_errors=True)

    def _path(self, exact: RevisionKey) -> Path:
        return self._folder / exact.id / exact.revision
