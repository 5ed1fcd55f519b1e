"""Replacing a folder: all of the new one or all of the old one, whatever happens while it is written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny import hf_lora

from quiver_peft import GPT
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.files import atomic_folder
from quiver_peft.files.atomic_folder import replace_folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder(tmp_path: Path) -> None:
    replace_folder(tmp_path / "deep" / "adapter", {"a.json": b"1", "b.bin": b""})
    assert content(tmp_path / "deep" / "adapter") == {"a.json": b"1", "b.bin": b""}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["adapter"]


def test_the_old_folder_goes_as_a_whole(tmp_path: Path) -> None:
    replace_folder(tmp_path / "adapter", {"a": b"old", "only-old": b"old"})
    replace_folder(tmp_path / "adapter", {"a": b"new", "only-new": b"new"})
    assert content(tmp_path / "adapter") == {"a": b"new", "only-new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_others_may_read_it(tmp_path: Path) -> None:
    """Temporary folders are private to their maker; what is put in place must not be."""
    replace_folder(tmp_path / "adapter", {"a": b""})
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o755


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    replace_folder(tmp_path / "adapter", {"a": b"old"})
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "adapter", {"a": b"new", "no/such/folder": b"new"})
    assert content(tmp_path / "adapter") == {"a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_reader_that_has_it_open_keeps_what_it_opened(tmp_path: Path) -> None:
    replace_folder(tmp_path / "adapter", {"a": b"old"})
    with (tmp_path / "adapter" / "a").open("rb") as file:
        replace_folder(tmp_path / "adapter", {"a": b"new"})
        assert file.read() == b"old"


# Writes revisions 0, 1, 2, ... of a folder until it is killed. The module is loaded by its path: no torch, quick start.
_WRITER = """
import importlib.util, itertools, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic_folder", sys.argv[1])
atomic_folder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic_folder)
atomic_folder.os.fsync = lambda descriptor: None  # not what a killed process needs, and the loop is tighter without
target = Path(sys.argv[2])
for number in itertools.count():
    files = {f"part{i}": str(number).encode() * 2000 for i in range(5)}
    atomic_folder.replace_folder(target, files)
    if number == 0:
        print("started", flush=True)
"""


def _kill_after(arguments: list[str], seconds: float, environment: dict[str, str] | None = None) -> None:
    with subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_writer_leaves_one_whole_revision(tmp_path: Path) -> None:
    target, delays = tmp_path / "adapter", random.Random(0)
    revisions: set[bytes] = set()
    num_leftovers = 0
    for attempt in range(400):
        # Killed at many different moments, some of them in the middle of a replacement; a busy machine needs longer.
        if attempt >= 40 and len(revisions) > 10 and num_leftovers > 0:
            break
        _kill_after([_WRITER, str(atomic_folder.__file__), str(target)], delays.uniform(0.0, 0.02))
        found = content(target)
        assert len(found) == 5
        assert len(set(found.values())) == 1, "files of two revisions"
        revision = found["part0"]
        assert len(revision) % 2000 == 0, "half a file"
        revisions.add(revision)
        leftovers = [path.name for path in tmp_path.iterdir() if path != target]
        assert all(name.startswith(".adapter-") for name in leftovers), "whoever lists adapters skips dot names"
        num_leftovers += len(leftovers) > 0
    assert len(revisions) > 10
    assert num_leftovers > 0


_SAVER = """
import itertools, sys, torch
from quiver_peft import GPT
torch.set_num_threads(1)
model = GPT.from_pretrained(sys.argv[1])
model.load_adapters(sys.argv[2])
for number in itertools.count():
    with torch.no_grad():
        next(model.trainable_parameters()).fill_(number)
    model.save_adapter(sys.argv[2], training={"number": number})
    if number == 0:
        print("started", flush=True)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_an_adapter_that_loads(llama_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    hf_lora(llama_folder, target)
    base = GPT.from_pretrained(llama_folder).base
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for seconds in (0.013, 0.0291):
        _kill_after([_SAVER, str(llama_folder), str(target)], seconds, environment)
        weights = read_adapter(target, base)
        record = json.loads((target / "quiver.json").read_text())
        assert record["revision"] == weights.revision
        assert set(weights.lora[0].a.unique().tolist()) == {float(record["training"]["number"])}
