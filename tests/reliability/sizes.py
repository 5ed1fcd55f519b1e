"""How much of each test runs: in full with `make reliability`, less of the same in CI."""

import os

FULL = os.environ.get("QUIVER_RELIABILITY") == "full"


def size(in_ci: int, in_full: int) -> int:
    """How many, or how many seconds."""
    return in_full if FULL else in_ci
