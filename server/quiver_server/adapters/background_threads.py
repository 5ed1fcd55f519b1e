"""Threads for work that nobody who is being answered waits for: the step loop has the processor first."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

_NICER = 10  # by so much than the process; every three steps or so halve a thread's weight
_NICEST = 19


def background_threads(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads run at a lower priority, where each thread has one of its own (Linux)."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=_lower_priority)


def _lower_priority() -> None:
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = min(os.getpriority(os.PRIO_PROCESS, thread) + _NICER, _NICEST)
        os.setpriority(os.PRIO_PROCESS, thread, nice)
