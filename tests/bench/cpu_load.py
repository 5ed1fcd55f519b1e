"""How busy other processes keep the machine while we measure: /proc/stat against our own processes' share."""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: fields of the first line of /proc/stat
UNCLEAN_CORES = 0.15


@dataclass
class Load:
    """Cores in use on average while the block ran."""

    ours: float = 0.0
    others: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether the machine was quiet enough for the figures to count."""
        return self.others <= UNCLEAN_CORES


@contextmanager
def measured_load() -> Generator[Load]:
    """Fills in the load when the block ends. Ours are this process and all that came from it and still run."""
    load = Load()
    started, busy, ours = time.perf_counter(), _busy_seconds(), _our_seconds()
    yield load
    seconds = time.perf_counter() - started
    own = _our_seconds() - ours
    load.ours = own / seconds
    load.others = max(_busy_seconds() - busy - own, 0.0) / seconds


def resident_bytes(pid: int) -> int:
    """A process's resident memory now."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _busy_seconds() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[i]) for i in _BUSY) / _TICKS


def _our_seconds() -> float:
    """Of this process, its descendants, and those of their children that were waited for."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The command in parentheses may hold spaces; after it: state, parent, ..., utime, stime, cutime, cstime.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = sum(int(field) for field in fields[11:15]) / _TICKS
    return sum(used for pid, used in seconds.items() if _descends(pid, os.getpid(), parents))


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid not in (ancestor, 0):
        pid = parents.get(pid, 0)
    return pid == ancestor
