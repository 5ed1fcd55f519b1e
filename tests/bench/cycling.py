"""What running requests feel while adapters are loaded and evicted beside them: inter-token latency, with and without.

    python tests/bench/cycling.py [--adapters 100] [--per-second 3] [--host-mib 1024] [--rounds 12]

A real server on a random 60 M Llama; 8 streams of 8 pinned LoRA adapters of rank 16 generate 96 tokens each, again and
again. In every other pass a thread loads the other adapters in turn, so many a second, through memory that holds four
of them. Passes alternate, so that other processes' load hits both kinds. Prints the latencies and their ratio as JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from support.live_server import LiveServer  # noqa: E402 - the path above
from support.tiny import edit_json, hf_lora, tiny_llama, tiny_tokenizer  # noqa: E402

from quiver import Client  # noqa: E402

NUM_STREAMS = 8
SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}


def make(folder: Path, num_adapters: int) -> None:
    """The base, and adapters that differ in their configuration: other revisions, one file of weights on the disk."""
    tiny_llama(folder / "base", **SHAPE)
    tiny_tokenizer(folder / "base")
    first = folder / "adapters" / "a0"
    hf_lora(folder / "base", first, rank=16, targets="all-linear")
    for index in range(1, NUM_STREAMS + num_adapters):
        other = folder / "adapters" / f"a{index}"
        other.mkdir()
        os.link(first / "adapter_model.safetensors", other / "adapter_model.safetensors")
        (other / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
        edit_json(other / "adapter_config.json", lora_alpha=8 + index)


def gaps(server: LiveServer, index: int) -> list[float]:
    """Seconds between the tokens of one stream, without the first."""
    with server.client() as client:
        prompt = [3 + (index * 37 + i * 11) % 300 for i in range(32)]
        stream = client.stream(prompt, adapter=f"a{index}", max_new_tokens=96, ignore_eos=True)
        times = [time.perf_counter() for _ in stream]
    return list(np.diff(times))


def one_pass(server: LiveServer, cycled: range, per_second: float) -> tuple[list[float], int]:
    """All gaps of all streams, and how many adapters were loaded meanwhile."""
    done = threading.Event()
    loaded: list[int] = []

    def cycle(client: Client) -> None:
        while not done.is_set():
            started = time.perf_counter()
            client.load_adapter(f"a{cycled[len(loaded) % len(cycled)]}")
            loaded.append(1)
            done.wait(max(1 / per_second - (time.perf_counter() - started), 0.0))

    with ThreadPoolExecutor(NUM_STREAMS + 1) as threads, server.client() as client:
        cycling = threads.submit(cycle, client) if cycled else None
        found = [gap for stream in threads.map(partial(gaps, server), range(NUM_STREAMS)) for gap in stream]
        done.set()
        if cycling is not None:
            cycling.result()
    return found, len(loaded)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--per-second", type=float, default=3)
    parser.add_argument("--host-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.adapters)
        memory = ("--adapter-memory-mib", str((NUM_STREAMS + 4) * 9))
        memory += ("--adapter-host-memory-mib", str(options.host_mib))
        server = LiveServer(folder / "base", folder / "adapters", folder / "log", *memory, num_threads=None)
        with server.client() as client:
            for index in range(NUM_STREAMS):
                client.load_adapter(f"a{index}", pin=True)
        cycled = range(NUM_STREAMS, NUM_STREAMS + options.adapters)
        one_pass(server, range(0), 1)
        results: dict[bool, list[float]] = {False: [], True: []}
        num_loaded = 0
        for _ in range(options.rounds):
            for with_loads in (False, True):
                found, loads = one_pass(server, cycled if with_loads else range(0), options.per_second)
                results[with_loads] += found
                num_loaded += loads
        load_seconds = server.metric("quiver_adapter_load_seconds_sum")
        num_loads = server.metric("quiver_adapter_load_seconds_count")
        server.stop()
    report: dict[str, object] = {"loads": num_loaded, "mean_load_ms": round(1000 * load_seconds / num_loads, 1)}
    for percentile in (50, 95, 99):
        still, loading = (float(np.percentile(results[key], percentile)) for key in (False, True))
        report[f"p{percentile}_ms"] = [round(1000 * still, 2), round(1000 * loading, 2), round(loading / still, 3)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
