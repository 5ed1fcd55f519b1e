"""Aliases, pins and sources on disk: what was answered survives, whatever happens, and one server has them."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.crash_tests import full, run_alone

from quiver_peft.errors import QuiverError
from quiver_server.adapters.registry import Registry
from quiver_server.adapters.revision import RevisionKey
from quiver_server.errors import RequestError

ONE, TWO = RevisionKey("support", "1" * 64), RevisionKey("support", "2" * 64)


async def test_what_was_decided_is_there_after_a_restart(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "state")
    assert await registry.set_alias("live", ONE) is None
    assert await registry.set_alias("live", TWO) == ONE
    assert await registry.set_alias("other", ONE) is None
    assert await registry.set_alias("other", None) == ONE
    await registry.set_pin("support", True)
    await registry.set_pin(str(ONE), True)
    await registry.set_pin("support", False)
    await registry.set_source("support", "s3://bucket/team/v2")
    decided = registry.state
    registry.close()
    again = Registry(tmp_path / "state")
    assert again.state == decided
    assert (again.state.aliases, again.state.pins) == ({"live": TWO}, {str(ONE)})
    assert again.state.sources == {"support": "s3://bucket/team/v2"}
    assert (again.state.names(ONE), again.state.names(TWO)) == (True, True)
    assert not again.state.names(RevisionKey("support", "3" * 64))
    again.close()


async def test_changes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    await asyncio.gather(*(registry.set_alias(f"a{i}", ONE) for i in range(20)))
    registry.close()
    assert len(Registry(tmp_path).state.aliases) == 20


async def test_a_change_that_is_not_written_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    await registry.set_alias("live", ONE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"nothing has changed, .*registry.json cannot be written"):
        await registry.set_alias("live", TWO)
    monkeypatch.undo()
    assert registry.state.aliases == {"live": ONE}
    registry.close()
    assert Registry(tmp_path).state.aliases == {"live": ONE}


def test_one_folder_is_one_servers(tmp_path: Path) -> None:
    first = Registry(tmp_path)
    with pytest.raises(QuiverError, match=rf"another server uses it \(process {os.getpid()}\)"):
        Registry(tmp_path)
    first.close()
    Registry(tmp_path).close()
    without = [Registry(None), Registry(None)]
    folders = [registry.folder for registry in without]
    for registry in without:
        registry.close()
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ({"aliases": 5}, "not a registry"),
        ({"aliases": {"live": "support"}}, "not a registry"),
        ({"aliases": {"live": "../x@" + "1" * 64}}, "not a registry"),
        ({"aliases": {"../live": str(ONE)}}, "'../live' cannot be an adapter's id"),
        ({"pins": ["/etc"]}, "'/etc' cannot be an adapter's id"),
        ({"schema_version": 2}, "schema_version 2 is not known"),
    ],
)
def test_what_is_no_registry_is_refused_not_forgotten(tmp_path: Path, content: Any, fragment: str) -> None:
    good = {"schema_version": 1, "aliases": {}, "pins": [], "sources": {}}
    text = content if isinstance(content, str) else json.dumps({**good, **content})
    (tmp_path / "registry.json").write_text(text)
    with pytest.raises(QuiverError, match=fragment) as caught:
        Registry(tmp_path)
    assert "registry.json" in str(caught.value)
    assert (tmp_path / "registry.json").read_text() == text


_KILLED = """
import asyncio, sys
from pathlib import Path
from support.crash_tests import kill_often
from quiver_server.adapters.registry import Registry
from quiver_server.adapters.revision import RevisionKey

last = [0]

def write(say):
    async def move():
        registry = Registry(Path(sys.argv[1]))
        for number in range(last[0] + 1, 10**9):
            await registry.set_alias("live", RevisionKey("support", f"{number:064x}"))
            say(number)
    asyncio.run(move())

def check(said):
    registry = Registry(Path(sys.argv[1]))
    registry.close()
    found, answered = int(registry.state.aliases["live"].revision, 16), int(said[-1])
    assert answered > last[0] and answered <= found <= answered + 1, (last, answered, found)
    last[0] = found

kill_often(50, write, check)
"""


@pytest.mark.slow
def test_killed_at_any_moment_what_was_answered_is_there(tmp_path: Path) -> None:
    """Fifty times: the last alias that was answered, or the one that was being moved to."""
    assert run_alone(_KILLED, str(tmp_path)) == "survived 50"
