"""LoadAdapter means the content of when it was asked, whatever is being loaded already. Real folders and banks."""

import asyncio
import shutil
import threading
from functools import partial
from pathlib import Path

import torch
from support.tiny import hf_lora

from quiver_peft.adapters.formats.adapter_files import AdapterFiles, read_files
from quiver_peft.adapters.formats.adapter_folder import parse_adapter
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_server.adapters.open import open_adapters
from quiver_server.telemetry.metrics import Metrics


async def test_a_load_under_way_is_not_taken_for_what_came_after_it(llama_base: Path, tmp_path: Path) -> None:
    """A request has read the old content, but not parsed it, when the folder is replaced and LoadAdapter called."""
    for seed in (0, 1):
        hf_lora(llama_base, tmp_path / str(seed), rank=4, seed=seed)
    adapters = tmp_path / "adapters"
    shutil.copytree(tmp_path / "0", adapters / "changing")
    base = GPTBase.from_pretrained(llama_base)
    reading, may_parse = threading.Event(), threading.Event()

    def parse(files: AdapterFiles) -> AdapterWeights:
        reading.set()
        assert may_parse.wait(10)
        return parse_adapter(files, base)

    banks = AdapterBanks(2**22, torch.float32, torch.device("cpu"))
    sizes = {"host_bytes": 2**22, "disk_bytes": 2**22}
    store, admin = open_adapters([str(adapters)], None, banks, parse, Metrics(), **sizes)
    try:
        asked = asyncio.create_task(store.acquire("changing"))
        await asyncio.to_thread(partial(reading.wait, 10))
        shutil.copytree(tmp_path / "1", adapters / "changing", dirs_exist_ok=True)
        loading = asyncio.create_task(admin.load("changing"))
        await asyncio.sleep(0.05)
        may_parse.set()
        old, entry = await asyncio.gather(asked, loading)
        assert entry.resident is not None
        assert entry.resident.revision != old.revision
        assert entry.resident.revision == read_files(tmp_path / "1").revision
        await store.release(old)
    finally:
        may_parse.set()
        store.close()
