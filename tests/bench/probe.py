"""The machine's limits: how fast memory is read and how fast a large float32 GEMM runs, with all cores.

python -m bench.probe        prints {"bytes_per_second": ..., "flops": ...}
"""

import json
import os
import time
from collections.abc import Callable

import torch

_READ_FLOATS = 2**26  # 256 MiB: far more than any cache
_GEMM = 2048
_ROUNDS = 12


def best_seconds(call: Callable[[], object]) -> float:
    """The fastest of several calls: the limit, not the average under other load."""
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(os.cpu_count() or 1)
    data = torch.ones(_READ_FLOATS)
    read = data.nbytes / best_seconds(data.sum)
    left, right, out = (torch.ones(_GEMM, _GEMM) for _ in range(3))
    flops = 2 * _GEMM**3 / best_seconds(lambda: torch.mm(left, right, out=out))
    print(json.dumps({"bytes_per_second": read, "flops": flops}))


if __name__ == "__main__":
    main()
