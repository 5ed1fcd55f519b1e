"""The script for machines with GPUs, on gloo: layouts are run, and what differs or fails is told.

That layouts agree: `trainer/parallel/test_parallel_training.py`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.gpu_train import compare, layouts, line, main
from support.ranks import ROOT

STEPS = 5


@pytest.mark.slow
def test_a_layout_is_run_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "made" / "gpu-train.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "GLOO_SOCKET_IFNAME": "lo"}
    what = ["--size", "tiny", "--device", "cpu", "--processes", "1", "--dtypes", "float32", "--steps", str(STEPS)]
    command = [sys.executable, "-m", "bench.gpu_train", *what, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    (alone,) = report["results"]
    assert (report["device"], alone["layout"]) == ("CPU, gloo", "tensor 1 x data 1 overlap float32")
    assert alone["agrees"] and alone["tokens_per_second"] > 0 and alone["peak_mib"] > 50
    assert len(alone["losses"]) == STEPS


def test_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "3"])
    assert "--steps 3: the first 3 are not timed" in capsys.readouterr().err


def test_every_layout_of_four_processes() -> None:
    names = [layout.name for layout in layouts(4, ["float32"])]
    assert names[0] == "tensor 1 x data 1 overlap float32"
    assert (
        len(set(names)) == len(names) == 1 + 2 + 4 + 2
    )  # alone; tensor 1; 2 with sequence or not; 4, nothing to reduce
    assert {name.partition(" sequence")[0] for name in names if "sequence" in name} == {
        "tensor 2 x data 2",
        "tensor 4 x data 1",
    }


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([5.0, 4.00005], "losses differ by 5.0e-05"),
        ([5.0, 4.1], "losses differ by 1.0e-01  TOO MUCH"),
        ([5.0, math.nan], "losses differ by nan  TOO MUCH"),
    ],
)
def test_losses_that_differ_are_told(losses: list[float], told: str) -> None:
    found = compare({"losses": losses, "tokens_per_second": 1.0, "peak_mib": 1.0}, [5.0, 4.0], "float32")
    assert line("a layout", found).endswith(told)
    assert found["agrees"] is ("TOO MUCH" not in told)


def test_a_layout_that_failed_is_told() -> None:
    found = compare({"failed": "returned non-zero exit status 1."}, [], "float32")
    assert line("a layout", found).endswith("FAILED: returned non-zero exit status 1.")
    assert "agrees" not in found
