"""Training over N processes: do all layouts give the losses of one process, and how fast is each?

    make gpu-train                                   # on a machine with GPUs: NCCL, one process for each
    PYTHONPATH=tests python -m bench.gpu_train --processes 2 --size tiny --device cpu     # gloo, anywhere

Each layout (tensor x data, with and without sequence parallelism, with and without the overlap of gradient reduction,
fp32 and bf16) trains a LoRA on a random base for some steps in processes of its own. Written as JSON and as a table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.gpu_train_ranks import SIZES

# Of losses that are means over the same rows: what the order of sums may change, in fp32 and with a bf16 base.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Layout:
    """processes: of which `tensor` hold a base together."""

    processes: int
    tensor: int
    sequence: bool
    overlap: bool
    dtype: str

    @property
    def name(self) -> str:
        """For people."""
        marks = [mark for mark, on in (("sequence", self.sequence), ("overlap", self.overlap)) if on]
        return " ".join([f"tensor {self.tensor} x data {self.processes // self.tensor}", *marks, self.dtype])


def layouts(processes: int) -> Iterator[Layout]:
    """One process first, of each type: what the others are compared with."""
    for dtype in TOLERANCE:
        yield Layout(1, 1, False, True, dtype)
        for tensor in (t for t in range(1, processes + 1) if processes % t == 0):
            for sequence in (False, True) if tensor > 1 else (False,):
                for overlap in (False, True) if tensor < processes else (True,):
                    if processes > 1:
                        yield Layout(processes, tensor, sequence, overlap, dtype)


def measure(layout: Layout, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the first rank of a run found. Raises CalledProcessError."""
    out = folder / "result.json"
    settings = {**asdict(layout), "size": options.size, "steps": options.steps, "device": options.device}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.processes)]
    words = ["-m", "bench.gpu_train_ranks", json.dumps(settings), str(folder / "base"), str(out)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, *launcher, *words], check=True, env=environment, timeout=900)
    return json.loads(out.read_text())


def main() -> int:
    """Returns 1 where a layout gives other losses than one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the random base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-train.json"))
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    alone: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts(options.processes):
            found = measure(layout, options, Path(folder))
            expected = alone.setdefault(layout.dtype, found["losses"])
            found["difference"] = max(abs(a - b) for a, b in zip(found["losses"], expected, strict=True))
            found["agrees"] = found["difference"] <= TOLERANCE[layout.dtype]
            results.append({"layout": layout.name, **found})
            print(
                f"{layout.name:<45} {found['tokens_per_second']:>10,.0f} tokens/s {found['peak_mib']:>8,.0f} MiB  "
                f"losses differ by {found['difference']:.1e}{'' if found['agrees'] else '  TOO MUCH'}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "CPU, gloo"
    report = {"device": device, "torch": torch.__version__, "size": options.size, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.out}")
    return 0 if all(result["agrees"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
