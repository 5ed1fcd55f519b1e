"""What tells that a file was replaced or written again since it was read."""

from pathlib import Path

FileStamp = tuple[int, ...]


def file_stamp(path: Path) -> FileStamp:
    """Size, times and number of a file. Raises OSError."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
