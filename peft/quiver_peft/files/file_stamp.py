"""A stamp (size, times, inode) that changes when a file is rewritten or replaced."""

from pathlib import Path

FileStamp = tuple[int, ...]


def file_stamp(path: Path) -> FileStamp:
    """Size, modification and change time and inode of a file. Raises OSError."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
