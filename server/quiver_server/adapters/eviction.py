"""Which adapters give way when another needs room: the cheapest to lose among those that lie where it would fit.

Each resident has a worth, Greedy-Dual-Size-Frequency (Cherkasova 1998): age + uses · seconds to load it again / bytes.
The age rises to the worth of whatever gave way, so that what was popular once does not stay for ever.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class ResidentRange(NamedTuple):
    """Bytes [start, end) of the adapter memory. worth: None for what cannot be moved: in use, or pinned."""

    slot: int
    start: int
    end: int
    priority: float | None


class GdsfPolicy:
    """The worth of what is in memory, as time goes by."""

    def __init__(self) -> None:
        self._age = 0.0

    def priority(self, num_uses: int, reload_seconds: float, num_bytes: int) -> float:
        """Of an adapter that was used now, for the `num_uses`-th time."""
        return self._age + num_uses * reload_seconds / num_bytes

    def on_evicted(self, worth: float) -> None:
        """What comes from now on is worth at least as much."""
        self._age = max(self._age, worth)


def choose_victims(occupied: Iterable[ResidentRange], capacity: int, needed: int) -> list[int] | None:
    """The slots to clear so that one gap has `needed` bytes, at the least total worth; None when that cannot be.

    Memory is not compacted: room is a stretch between two things that stay. Of equally cheap ones, the fewest slots.
    """
    best: tuple[float, int, list[int]] | None = None
    stretch: list[ResidentRange] = []  # neighbours that would go, in order of their places
    begin = 0  # of the room that they and the gaps around them would make
    ordered = sorted(occupied, key=lambda item: item.start)
    for item, end in zip([None, *ordered], [*(item.start for item in ordered), capacity], strict=True):
        if item is not None and item.priority is None:
            stretch, begin = [], item.end
        elif item is not None:
            stretch.append(item)
        # As short as it can be: every room ends where something stays, or at the end of the memory.
        while stretch and end - stretch[0].end >= needed:
            begin = stretch.pop(0).end
        if end - begin >= needed:
            candidate = (_total(stretch), len(stretch), [item.slot for item in stretch])
            best = candidate if best is None else min(best, candidate)
    return None if best is None else best[2]


def _total(stretch: Sequence[ResidentRange]) -> float:
    return sum(item.priority for item in stretch if item.priority is not None)
