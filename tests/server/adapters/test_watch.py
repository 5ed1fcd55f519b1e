"""What a watcher of adapters is told: each change once, what came together or was missed as one."""

import asyncio

from quiver_server.adapters.watch import ChangeFeed


def test_what_was_missed_is_merged() -> None:
    async def watch() -> None:
        changes = ChangeFeed()
        changes.notify("before anybody watched")
        with changes.watching() as slow, changes.watching() as other:
            for _ in range(100):
                changes.notify("restless")
                changes.notify("other")
            assert await slow.wait(5) == {"restless", "other"}
            assert await slow.wait(0.01) == set(), "nothing is told twice"
            changes.notify("restless")
            assert await slow.wait(5) == {"restless"}
            assert await other.wait(5) == {"restless", "other"}, "each watcher has what it missed"

    asyncio.run(watch())


def test_what_changes_together_is_told_together() -> None:
    async def watch() -> None:
        changes = ChangeFeed()
        with changes.watching() as watcher:
            told = asyncio.create_task(watcher.wait(5))
            for name in ("first", "second", "third"):
                changes.notify(name)
                await asyncio.sleep(0)  # the watcher would go on here
            assert await told == {"first", "second", "third"}

    asyncio.run(watch())


def test_who_watches_no_more_is_told_nothing() -> None:
    async def watch() -> None:
        changes = ChangeFeed()
        with changes.watching() as watcher:
            pass
        changes.notify("later")
        assert await watcher.wait(0.01) == set()

    asyncio.run(watch())
