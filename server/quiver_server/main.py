"""`quiver serve`: installs the SIGTERM handler before anything heavy is imported, then reads the command line."""

import signal
import sys
from types import FrameType


def _exit_while_starting(signum: int, frame: FrameType | None) -> None:
    """Nothing is served yet, so there is nothing to drain."""
    sys.exit(0)


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    # An unhandled SIGTERM is ignored by the kernel for process 1, which is what a container runs us as.
    signal.signal(signal.SIGTERM, _exit_while_starting)
    from quiver_server.cli import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
