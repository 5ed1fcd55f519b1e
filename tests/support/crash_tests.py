"""Kills a writer again and again, in processes that are forked so that what they import is paid for once."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

_ROOT = Path(__file__).parents[2]
Say = Callable[[object], None]


def full(descriptor: int) -> None:
    """What `os.fsync` does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run_alone(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own; returns what it printed. It must end well."""
    rooms = os.pathsep.join(str(_ROOT / room) for room in ("proto", "peft", "server", "tests"))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": rooms},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _say(descriptor: int, word: object) -> None:
    os.write(descriptor, f"{word}\n".encode())


def kill_often(num_times: int, write: Callable[[Say], None], check: Callable[[list[str]], None]) -> None:
    """Run `write(say)` in a child, kill -9 it at a random moment after its first word, and `check` what it said.

    Called in a process of its own, without threads.
    """
    draw = random.Random(6)
    for _ in range(num_times):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                write(partial(_say, writing))
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as said:
            first = said.readline()
            time.sleep(draw.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            check([first.strip(), *said.read().split()])
    print("survived", num_times)
