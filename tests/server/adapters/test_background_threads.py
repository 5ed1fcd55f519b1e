"""Background threads give way to all others of the process."""

import os
import sys
import threading

import pytest

from quiver_server.adapters.background_threads import background_threads


def nice_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_their_priority_is_lower_and_that_of_others_stays() -> None:
    before = nice_of_this_thread()
    with background_threads(2, "later") as threads:
        found = {threads.submit(nice_of_this_thread).result() for _ in range(4)}
        assert threads.submit(lambda: threading.current_thread().name).result().startswith("later")
    assert found == {min(before + 10, 19)}
    assert nice_of_this_thread() == before
