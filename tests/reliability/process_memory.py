"""How much memory a process holds, as Linux counts it."""

from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Its resident set, without what files on disk back and others may share."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status names no RssAnon")


def num_threads(pid: int) -> int:
    """Of the process now."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def num_open_files(pid: int) -> int:
    """Files and sockets."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
