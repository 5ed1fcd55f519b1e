"""The GPU script's plumbing, on the CPU: tests are run and counted, cells are measured once, ratios are as defined."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu import add_ratios, run_tests
from bench.gpu_step import Load

ROOT = Path(__file__).parents[2]
FEW_TESTS = "tests/peft/kernels/triton/test_scale.py"


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "bench.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_measures_once_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "made" / "gpu.json"
    options = ("--device", "cpu", "--quick", "--tests", FEW_TESTS, "--out", str(out))
    done = run_script(*options, "--seconds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 cells, 3 not begun" in done.stdout
    first: dict[str, Any] = json.loads(out.read_text())
    assert first["machine"]["torch"] == torch.__version__
    assert first["read_bytes_per_second"] > 0 and first["adapter_load"]["bytes"] > 0
    assert first["tests"]["failed"] == []
    # One that was measured before is kept, the others are not yet there.
    kept = {"step_seconds": 2.0, "adapter_bytes": 0, "read_bytes": 1}
    out.write_text(json.dumps(first | {"cells": {"B=4 context=20 K=0": kept}}))
    done = run_script(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 3 and cells["B=4 context=20 K=0"]["step_seconds"] == 2.0
    mixed = cells["B=4 context=20 K=3 r=2/4"]
    assert mixed["step_seconds"] > 0 and mixed["adapter_bytes"] > 0 and mixed["step_excess"] < 0


def test_no_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: run `make test` there")
    done = run_script("--out", "unused.json")
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr


@pytest.mark.slow
def test_a_failed_test_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "test_bad.py"
    bad.write_text("import pytest\n\n\n@pytest.mark.cuda\ndef test_bad() -> None:\n    assert False\n")
    found = run_tests([str(bad)], 60)
    assert (found["tests"], found["failures"], found["skipped"]) == (1, 1, 0)
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_bad"]
    assert "not done after" in run_tests([str(bad)], 0.01)["error"]


def test_ratios() -> None:
    """A base step of 10 ms; adapters whose 2 GB take 1 ms at 2 TB/s, and a step 1.5 ms longer: 5 % too much."""
    loads = [Load(8, 64, ()), Load(8, 64, (16,))]
    cells: dict[str, Any] = {
        loads[0].name: {"step_seconds": 0.010, "adapter_bytes": 0, "read_bytes": 16e9},
        loads[1].name: {"step_seconds": 0.0115, "adapter_bytes": 2e9, "read_bytes": 18e9, "graph_seconds": 0.009},
    }
    add_ratios(cells, loads, 2e12)
    assert cells[loads[1].name]["step_excess"] == pytest.approx(0.05)
    assert cells[loads[1].name]["step_bandwidth_fraction"] == pytest.approx(18 / 23)
    assert "graph_excess" not in cells[loads[1].name], "the base has none to compare with"
