"""Whose processor time it was."""

import os
import subprocess
import sys
import time

from bench.cpu_load import measured_load, resident_bytes

BURN = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
# A process whose parent ends at once belongs to somebody else.
ORPHAN = f"import os, time\nif os.fork() == 0:\n    exec({BURN!r})\n    os._exit(0)\n"


def test_children_are_ours() -> None:
    started = time.perf_counter()
    with measured_load() as load:
        subprocess.run([sys.executable, "-c", BURN], check=True)
    assert load.ours * (time.perf_counter() - started) > 0.35


def test_others_are_not() -> None:
    started = time.perf_counter()
    with measured_load() as load:
        subprocess.run([sys.executable, "-c", ORPHAN], check=True)
        time.sleep(0.2)
        while time.perf_counter() - started < 1.0:
            time.sleep(0.05)
    assert load.others * (time.perf_counter() - started) > 0.2
    assert not load.clean


def test_resident_memory() -> None:
    before = resident_bytes(os.getpid())
    held = bytearray(os.urandom(2**20) * 64)
    assert 60 * 2**20 < resident_bytes(os.getpid()) - before < 200 * 2**20
    del held
