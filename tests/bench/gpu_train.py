"""Training over N processes: do all layouts give the losses of one process, and how fast is each?

    make gpu-train                                   # on a machine with GPUs: NCCL, one process for each
    PYTHONPATH=tests python -m bench.gpu_train --processes 2 --size tiny --device cpu     # gloo, anywhere

Each layout (tensor x data, with and without sequence parallelism, with and without the overlap of gradient reduction,
fp32 and bf16) trains a LoRA on a random base for some steps in processes of its own. Written as JSON and as a table; a
layout that fails (there is no memory for it) is named, and the others go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Of losses that are means over the same rows: what the order of sums may change, in fp32 and with a bf16 base.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Shapes of a Llama. rows and tokens: of a batch, over all processes; so many that one GPU of 80 GB has room for them
# (layers keep their inputs and are computed again for the gradient: `recomputes`).
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "ffn": 96, "layers": 2, "heads": 4, "vocab": 320, "rows": 8, "tokens": 32},
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "vocab": 128256, "rows": 16, "tokens": 1024},
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "vocab": 128256, "rows": 8, "tokens": 1024},
}
UNTIMED_STEPS = 3
_LIMIT_SECONDS = 900  # of one layout


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


def layouts(processes: int, dtypes: Sequence[str]) -> Iterator[Layout]:
    """One process first, of each type: what the others are compared with."""
    for dtype in dtypes:
        yield Layout(1, 1, False, True, dtype)
        for tensor in (t for t in range(1, processes + 1) if processes % t == 0):
            for sequence in (False, True) if tensor > 1 else (False,):
                for overlap in (False, True) if tensor < processes else (True,):
                    if processes > 1:
                        yield Layout(processes, tensor, sequence, overlap, dtype)


def make_base(folder: Path, size: dict[str, int]) -> None:
    """A random Llama of this size on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=max(4, size["heads"] // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(str(folder))


def measure(layout: Layout, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the first rank of a run found, or why there is nothing; what its ranks print goes to standard error."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    settings = {**asdict(layout), "size": options.size, "steps": options.steps, "device": options.device}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.processes)]
    words = ["-m", "bench.gpu_train_ranks", json.dumps(settings), str(folder / "base"), str(out)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    try:
        command = [sys.executable, *launcher, *words]
        subprocess.run(command, check=True, env=environment, timeout=_LIMIT_SECONDS, stdout=sys.stderr)
    except subprocess.SubprocessError as error:
        return {"failed": str(error).rpartition("' ")[2]}
    return json.loads(out.read_text())


def compare(found: dict[str, Any], expected: Sequence[float], dtype: str) -> dict[str, Any]:
    """Where a layout did not fail: how far its losses are from one process's, and whether that is near enough."""
    if "failed" in found:
        return found
    differences = torch.tensor(found["losses"]) - torch.tensor(expected)
    difference = differences.abs().max().item()  # nan where any is
    return {**found, "difference": difference, "agrees": difference <= TOLERANCE[dtype]}


def line(name: str, found: dict[str, Any]) -> str:
    """For people."""
    if "failed" in found:
        return f"{name:<45} FAILED: {found['failed']}"
    return (
        f"{name:<45} {found['tokens_per_second']:>10,.0f} tokens/s {found['peak_mib']:>8,.0f} MiB  "
        f"losses differ by {found['difference']:.1e}{'' if found['agrees'] else '  TOO MUCH'}"
    )


def main(argv: Sequence[str]) -> int:
    """Returns 1 where a layout fails or gives other losses than one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the random base")
    parser.add_argument("--steps", type=int, default=20, help=f"of each run; the first {UNTIMED_STEPS} are not timed")
    parser.add_argument("--dtypes", choices=TOLERANCE, nargs="+", default=list(TOLERANCE), help="of the base")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-train.json"))
    options = parser.parse_args(argv)
    if options.steps <= UNTIMED_STEPS:
        parser.error(f"--steps {options.steps}: the first {UNTIMED_STEPS} are not timed")
    results: list[dict[str, Any]] = []
    alone: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder, "base"), SIZES[options.size])
        for layout in layouts(options.processes, options.dtypes):
            found = measure(layout, options, Path(folder))
            if "losses" in found:
                alone.setdefault(layout.dtype, found["losses"])
            found = compare(found, alone.get(layout.dtype, []), layout.dtype)
            results.append({"layout": layout.name, **found})
            print(line(layout.name, found), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "CPU, gloo"
    report = {"device": device, "torch": torch.__version__, "size": options.size, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.out}")
    return 0 if all(result.get("agrees") for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
