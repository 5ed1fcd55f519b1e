"""Tells watchers what has changed: which adapters to look at again. What they missed is merged, never queued."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

_SETTLE_SECONDS = 0.02  # what changes together is told together


class Watcher:
    """One reader: the ids that have changed since it looked last; so many at most as there are adapters."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._changed = asyncio.Event()

    def notify(self, adapter_id: str) -> None:
        """This one has changed."""
        self._ids.add(adapter_id)
        self._changed.set()

    async def wait(self, seconds: float) -> set[str]:
        """The ids that have changed; empty when nothing has for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return set()
        await asyncio.sleep(_SETTLE_SECONDS)
        self._changed.clear()
        ids, self._ids = self._ids, set()
        return ids


class ChangeFeed:
    """Where changes are noted and watched. Lives in the event loop."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    def notify(self, adapter_id: str) -> None:
        """Something about this adapter is not as it was."""
        for watcher in self._watchers:
            watcher.notify(adapter_id)

    @contextmanager
    def watching(self) -> Generator[Watcher]:
        """From now on, nothing is missed."""
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
