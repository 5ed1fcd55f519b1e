"""Revisions on the server's disk: whole and what their names say, or not there."""

import os
import shutil
from pathlib import Path

import pytest
from support.crash_tests import full, run_alone

from quiver_peft.adapters.formats.adapter_files import AdapterFiles
from quiver_server.adapters.disk_cache import DiskCache
from quiver_server.adapters.revision import RevisionKey

WEIGHTS = "adapter_model.safetensors"


def files(content: str, num_bytes: int = 1000) -> AdapterFiles:
    return AdapterFiles("somewhere", content.encode(), WEIGHTS, b"x" * (num_bytes - len(content)), None)


def exact(adapter_id: str, content: str) -> RevisionKey:
    return RevisionKey(adapter_id, files(content).revision)


def cache_in(folder: Path, capacity: int = 2**20, *staying: RevisionKey) -> DiskCache:
    return DiskCache(folder / "cache", capacity, staying.__contains__)


def test_what_was_put_is_got_by_the_next_process_too(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    assert cache.get(exact("a", "1")) is None
    assert cache.put("a", files("1"))
    assert cache.put("a", files("2"))
    assert cache.put("b", AdapterFiles("", b"c", WEIGHTS, b"w", b"record"))
    cache.set_current(exact("a", "2"))
    cache.set_current(exact("a", "not there"))
    for found in (cache, cache_in(tmp_path)):
        got = found.get(exact("a", "1"))
        assert got is not None
        assert got.by_name == files("1").by_name
        assert found.revisions("a") == sorted(exact("a", content).revision for content in "12")
        assert found.current("a") == exact("a", "2").revision
        assert (found.current("b"), found.current("nobody")) == (None, None)
        assert (found.bytes_of(exact("a", "1")), found.num_bytes) == (1000, 2008)


def test_a_revision_belongs_to_its_id_alone(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.put("a", files("1"))
    assert cache.get(exact("b", "1")) is None


def test_the_least_recently_used_goes_but_what_must_stay(tmp_path: Path) -> None:
    stays = exact("a", "1")
    cache = cache_in(tmp_path, 3000, stays)
    for content in "123":
        assert cache.put("a", files(content))
    assert cache.get(exact("a", "2")) is not None
    assert cache.put("a", files("4"))
    assert [cache.bytes_of(exact("a", content)) for content in "1234"] == [1000, 1000, 0, 1000]
    assert len(list((tmp_path / "cache" / "a").iterdir())) == 3
    assert not cache.put("a", files("5", 2500)), "there is no room for it beside what must stay"
    assert cache.num_bytes == 3000, "and nothing gave way for it"
    assert cache.put("a", files("6", 2000))
    assert cache.revisions("a") == sorted([stays.revision, files("6", 2000).revision])
    smaller = cache_in(tmp_path, 1500, stays)
    assert smaller.revisions("a") == [stays.revision]


@pytest.mark.parametrize("damage", ["changed", "cut", "file gone", "folder gone"])
def test_what_is_damaged_is_dropped_not_served(tmp_path: Path, damage: str) -> None:
    cache = cache_in(tmp_path)
    cache.put("a", files("1"))
    folder = tmp_path / "cache" / "a" / exact("a", "1").revision
    if damage == "changed":
        (folder / WEIGHTS).write_bytes(b"y" * 999)
    elif damage == "cut":
        os.truncate(folder / WEIGHTS, 500)
    elif damage == "file gone":
        (folder / WEIGHTS).unlink()
    else:
        shutil.rmtree(folder)
    assert cache.get(exact("a", "1")) is None
    assert (cache.num_bytes, cache.revisions("a")) == (0, [])
    assert not folder.exists()
    assert cache.put("a", files("1"))
    assert cache.get(exact("a", "1")) is not None


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert not cache.put("a", files("1"))
    monkeypatch.undo()
    assert cache.num_bytes == 0
    assert cache.put("a", files("1"))


_KILLED = """
import sys
from pathlib import Path
from support.crash_tests import kill_often
from quiver_peft.adapters.formats.adapter_files import AdapterFiles
from quiver_server.adapters.disk_cache import DiskCache
from quiver_server.adapters.revision import RevisionKey

def open_cache():
    return DiskCache(Path(sys.argv[1]) / "cache", 400_000, lambda exact: False)

def write(say):
    cache = open_cache()
    for number in range(10**9):
        files = AdapterFiles("", str(number).encode(), "adapter_model.safetensors", b"x" * 50_000, None)
        cache.put("a", files)
        cache.set_current(RevisionKey("a", files.revision))
        say(number)

def check(said):
    cache = open_cache()
    revisions = cache.revisions("a")
    assert len(revisions) >= 1 and cache.num_bytes <= 400_000
    for revision in revisions:
        found = cache.get(RevisionKey("a", revision))
        assert found is not None and found.revision == revision and len(found.weights) == 50_000
    folder = Path(sys.argv[1]) / "cache" / "a"
    assert {path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()} == set(revisions)

kill_often(50, write, check)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_holds_whole_revisions_only(tmp_path: Path) -> None:
    """Fifty times; and what was not finished is removed."""
    assert run_alone(_KILLED, str(tmp_path)) == "survived 50"
