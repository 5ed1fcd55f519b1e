"""SIGINT and SIGTERM as a flag that the training loop checks between steps."""

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The flag. signal_number: the signal received, or 0."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __call__(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect after this signal: 128 + its number."""
        return 128 + self.signal_number


@contextmanager
def stop_on_signals() -> Generator[StopRequest]:
    """The first signal sets the flag; a second one of the same kind ends the program at once."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(sys.stderr.fileno(), b"stopping after this step; once more to stop at once\n")

    try:
        for number in _SIGNALS:
            signal.signal(number, ask_to_stop)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
