"""Mutated adapter folders under a running server: each is refused in words or served as what it is; nothing else."""

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
from parity.every_method import HF_ADAPTERS, OUR_ADAPTERS, make_hf_adapter, make_our_adapter
from reliability.mutations import damaged, damaged_json
from reliability.sizes import size
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, running_server

from quiver import Client, QuiverClientError

NUM_FOLDERS = size(600, 5000)
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "quiver.json"
# Whole adapters to damage: every method's form on disk, Hugging Face's and ours.
HF_SEEDS = ("lora-r4", "dora-r3", "ia3", "prompt-9", "ptuning-5", "prefix-3")
OUR_SEEDS = ("canonical-pre", "lora+ia3", "prefix+prompt", "all-four")
RIGHT = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    settings = {name: LLAMA_ADAPTERS[name] for name in ("attention-r4", "all-r2")}
    with running_server(tmp_path_factory.mktemp("fuzzed"), base, settings) as bench:
        yield bench


@pytest.fixture(scope="module")
def seeds(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of whole adapters."""
    folder = tmp_path_factory.mktemp("seeds")
    for name in HF_SEEDS:
        make_hf_adapter(base, folder / name, HF_ADAPTERS[name]({"task_type": "CAUSAL_LM"}), seed=1)
    for name in OUR_SEEDS:
        make_our_adapter(base, folder / name, OUR_ADAPTERS[name], seed=2)
    return sorted(folder.iterdir())


def _header(data: bytes, draw: random.Random) -> bytes:
    """Safetensors: damage in the header alone; its length stays true every other time."""
    length = int.from_bytes(data[:8], "little")
    header = draw.choice([damaged, damaged_json])(data[8 : 8 + length], draw)
    told = len(header) if draw.random() < 0.5 else length
    return told.to_bytes(8, "little") + header + data[8 + length :]


DAMAGES: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [
    (CONFIG, damaged),
    (CONFIG, damaged_json),
    (CONFIG, damaged_json),
    (WEIGHTS, _header),
    (WEIGHTS, damaged),
    (RECORD, damaged),
    (RECORD, damaged_json),
]


def damage(folder: Path, draw: random.Random) -> None:
    """One file of it."""
    name, change = draw.choice([(name, change) for name, change in DAMAGES if (folder / name).exists()])
    path = folder / name
    path.write_bytes(change(path.read_bytes(), draw))


def revision_of(folder: Path) -> str:
    """As the design says: the digest of the configuration and the weights."""
    return hashlib.sha256((folder / CONFIG).read_bytes() + b"\0" + (folder / WEIGHTS).read_bytes()).hexdigest()


def test_mutated_adapters(bench: ServerFixture, seeds: list[Path]) -> None:
    codes: Counter[str] = Counter()
    with bench.server.client() as client, ThreadPoolExecutor(4) as threads:
        for start in range(0, NUM_FOLDERS, 100):
            codes.update(threads.map(partial(outcome, bench, client, seeds), range(start, start + 100)))
            for name in ("", "attention-r4", "all-r2"):
                bench.check(client, name)
    print(dict(codes))
    assert codes["INVALID_ARGUMENT"] > NUM_FOLDERS / 3
    assert codes["OK"] > NUM_FOLDERS / 50, "not every damage does harm"
    assert bench.server.metric("quiver_resident_adapters") == 2


def outcome(bench: ServerFixture, client: Client, seeds: list[Path], number: int) -> str:
    """What the server made of one damaged folder, which is gone afterwards."""
    draw = random.Random(number)
    name = f"fuzzed-{number}"
    folder = bench.adapters / name
    hidden = bench.adapters / f".{name}"
    shutil.copytree(draw.choice(seeds), hidden)
    damage(hidden, draw)
    hidden.rename(folder)
    try:
        answer = client.generate([5, 6, 7], adapter=name, max_new_tokens=2)
    except QuiverClientError as error:
        if "logits that are not finite" in str(error):
            client.unload_adapter(name)
            return "INTERNAL"  # weights of 1e38: well-formed, and the answer is honest
        assert error.code in RIGHT, f"{name}: {error.code} {error}"
        assert not client.get_adapter(name).device_bytes
        return error.code.name
    else:
        assert answer.adapter is not None and answer.adapter.id == name
        assert answer.adapter.revision == revision_of(folder)
        client.unload_adapter(name)
        return "OK"
    finally:
        shutil.rmtree(folder)
