"""Without a GPU: what would be launched on one compiles for it, and fits in its shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "lora_shrink_kernel",
    "lora_expand_kernel",
    "scale_inputs_kernel",
    "scale_outputs_kernel",
    "bottleneck_down_kernel",
    "bottleneck_up_kernel",
    "bottleneck_norm_kernel",
    "single_rows_kernel",
    "sum_splits_kernel",
    "chunk_rows_kernel",
}


# What a block may take at compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_BYTES = 232_448


@pytest.mark.slow
def test_every_launch_compiles(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, script, "90", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == KERNELS
    assert not [(name, size) for name, size in lines if int(size) > SHARED_BYTES]
