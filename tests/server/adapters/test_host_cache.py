"""What was read once is not read again while main memory has room for it."""

from functools import partial
from pathlib import Path

import pytest
from support.tiny import hf_lora

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_server.adapters.host_cache import HostCache, size_of


@pytest.fixture(scope="module")
def adapters(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterWeights]:
    """Three of one size."""
    folder = tmp_path_factory.mktemp("adapters")
    read = partial(read_adapter, base=GPTBase.from_pretrained(llama_base))
    for seed in range(3):
        hf_lora(llama_base, folder / f"a{seed}", seed=seed)
    return [read(folder / f"a{seed}") for seed in range(3)]


def test_what_is_kept_is_found_by_its_revision(adapters: list[AdapterWeights]) -> None:
    cache = HostCache(2**24)
    assert cache.get(adapters[0].revision) is None
    cache.put(adapters[0])
    cache.put(adapters[0])
    assert cache.get(adapters[0].revision) is adapters[0]
    assert cache.get(adapters[1].revision) is None
    assert cache.num_hits == 1
    assert cache.bytes_of(adapters[0].revision) == cache.num_bytes == adapters[0].num_parameters * 4
    assert cache.bytes_of(adapters[1].revision) == 0


def test_what_is_dropped_gives_its_bytes_back(adapters: list[AdapterWeights]) -> None:
    cache = HostCache(2**24)
    cache.put(adapters[0])
    assert cache.drop(adapters[0].revision) == size_of(adapters[0])
    assert cache.drop(adapters[0].revision) == 0
    assert cache.num_bytes == 0
    assert cache.get(adapters[0].revision) is None


def test_the_least_recently_used_goes(adapters: list[AdapterWeights]) -> None:
    one = size_of(adapters[0])
    cache = HostCache(2 * one)
    for index in (0, 1):
        cache.put(adapters[index])
    cache.get(adapters[0].revision)
    cache.put(adapters[2])
    assert [cache.bytes_of(item.revision) for item in adapters] == [one, 0, one]
    assert cache.num_bytes == 2 * one
    nothing = HostCache(one - 1)
    nothing.put(adapters[0])
    assert nothing.num_bytes == 0
