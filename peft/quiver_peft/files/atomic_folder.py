"""Atomic folder replacement: after a crash the folder is the old or the new one, never a mixture."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PIECE_BYTES = 2**18  # larger writes can block other threads in the kernel and delay the step loop


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
    """Puts the sibling folder `staging` in the place of `folder`, durably, and removes the old content."""
    sync_folder(staging)
    _exchange(staging, folder)
    sync_folder(folder.parent)
    shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path) -> None:
    """Swaps the folders: afterwards `staging` holds the previous content, if there was any."""
    if not folder.exists():
        staging.rename(folder)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (os.fsencode(staging), os.fsencode(folder))
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    # A file system without atomic exchange: for an instant there is no folder.
    aside = staging.with_name(staging.name + "-old")
    folder.rename(aside)
    staging.rename(folder)
    shutil.rmtree(aside)


def sync_folder(folder: Path) -> None:
    """Flushes a folder, so that renames in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
