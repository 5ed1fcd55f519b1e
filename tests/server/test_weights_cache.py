"""What was read once is not read again, unless it has changed."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from tiny import hf_lora

from quiver_peft.adapters.artifact import read_adapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_peft.errors import AdapterError
from quiver_server.weights_cache import WeightsCache


class Reader:
    """Reads folders and counts."""

    def __init__(self, base: GPTBase) -> None:
        self._read = partial(read_adapter, base=base)
        self.folders: list[str] = []

    def __call__(self, folder: Path) -> AdapterWeights:
        self.folders.append(folder.name)
        return self._read(folder)


@pytest.fixture
def reader(llama_base: Path) -> Reader:
    return Reader(GPTBase.from_pretrained(llama_base))


@pytest.fixture
def folders(llama_base: Path, tmp_path: Path) -> list[Path]:
    for seed in range(3):
        hf_lora(llama_base, tmp_path / f"a{seed}", seed=seed)
    return [tmp_path / f"a{seed}" for seed in range(3)]


def test_the_same_files_are_read_once(reader: Reader, folders: list[Path]) -> None:
    cache = WeightsCache(reader, 2**24)
    first = cache.read(folders[0])
    assert cache.read(folders[0]) is first
    assert cache.read(folders[1]) is not first
    assert reader.folders == ["a0", "a1"]
    assert cache.bytes_of(folders[0]) == first.num_parameters * 4
    assert cache.bytes_of(folders[2]) == 0


@pytest.mark.parametrize("how", ["copied over", "renamed in", "same size and time"])
def test_replaced_files_are_read_again(reader: Reader, folders: list[Path], how: str) -> None:
    cache = WeightsCache(reader, 2**24)
    old, new = folders[0] / "adapter_model.safetensors", folders[1] / "adapter_model.safetensors"
    before, stat = cache.read(folders[0]), old.stat()
    if how == "renamed in":
        os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        new.rename(old)
    else:
        shutil.copyfile(new, old)
    if how == "same size and time":
        os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert old.stat().st_size == stat.st_size
    after = cache.read(folders[0])
    assert after.revision != before.revision
    assert cache.read(folders[0]) is after


def test_what_became_unreadable_is_not_served_from_here(reader: Reader, folders: list[Path]) -> None:
    cache = WeightsCache(reader, 2**24)
    cache.read(folders[0])
    (folders[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        cache.read(folders[0])
    assert cache.num_bytes == 0


def test_the_least_recently_used_goes(reader: Reader, folders: list[Path]) -> None:
    one = reader(folders[0]).num_parameters * 4
    cache = WeightsCache(reader, 2 * one)
    reader.folders.clear()
    for index in (0, 1, 0, 2, 0, 1):
        cache.read(folders[index])
    assert reader.folders == ["a0", "a1", "a2", "a1"]
    assert cache.num_bytes == 2 * one
    nothing = WeightsCache(reader, one - 1)
    nothing.read(folders[0])
    assert nothing.num_bytes == 0
