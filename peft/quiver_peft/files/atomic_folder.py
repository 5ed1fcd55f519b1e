"""Replacing a folder in one step: after a crash there is the old one or the new one, never half of either."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PIECE_BYTES = 2**18  # a kernel may not let others run while it writes one: those who serve beside it feel it


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` ({name: content}) to a temporary sibling, flush it to disk, and put it in the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                whole = memoryview(content)
                for start in range(0, len(whole), _PIECE_BYTES):
                    file.write(whole[start : start + _PIECE_BYTES])
                file.flush()
                os.fsync(file.fileno())
        rename_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def rename_into_place(staging: Path, folder: Path) -> None:
    """Exchange `folder` for a sibling that was written beside it; what was there before is removed."""
    sync_folder(staging)
    _exchange(staging, folder)
    sync_folder(folder.parent)
    shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path) -> None:
    """Afterwards `folder` is the new content; `staging` is what was there before, if anything."""
    if not folder.exists():
        staging.rename(folder)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (os.fsencode(staging), os.fsencode(folder))
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    # A file system without exchange: the old folder steps aside for an instant.
    aside = staging.with_name(staging.name + "-old")
    folder.rename(aside)
    staging.rename(folder)
    shutil.rmtree(aside)


def sync_folder(folder: Path) -> None:
    """What was renamed in it stays so, whatever happens to the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
