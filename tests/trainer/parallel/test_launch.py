"""`torchrun -m quiver_trainer` and what `quiver train` says about it; Megatron is imported by nobody else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.ranks import ROOT
from support.tiny import tiny_llama, tiny_tokenizer
from trainer.conftest import load_recipe, write_rows

from quiver_trainer import ConfigError
from quiver_trainer.cli.train import main

RECIPE = """\
base: base
output: out
adapter: {method: lora, adapter_dim: 2}
data: {train: rows.jsonl, validation: rows.jsonl}
max_steps: 3
evaluation: {exact_match_samples: 2, max_new_tokens: 2}
device: cpu
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "base", num_hidden_layers=1)
    tiny_tokenizer(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def run(folder: Path, *command: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A Python process in a folder."""
    rooms = ("proto", "peft", "server", "trainer")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
        "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in rooms),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    words = [sys.executable, *map(str, command)]
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=200, env=environment, cwd=folder, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains(recipe: Path, tmp_path: Path) -> None:
    alone = run(tmp_path, "-m", "quiver_trainer", recipe, "output=alone")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(tmp_path, *launcher, "-m", "quiver_trainer", recipe, "parallel.tensor=2").stdout
    assert "out: lora on base in 2 processes (tensor 2 x data 1), cpu" in printed
    assert printed.count("out is trained") == alone.stdout.count("alone is trained") == 1
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "alone"))
    assert all((ours[name] - tensor).abs().max() <= 1e-5 for name, tensor in theirs.items())
    assert not (tmp_path / ".out.training").exists()


def test_many_processes_must_be_started_as_such(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "parallel.tensor=2"]) == 2
    told = capsys.readouterr().err
    assert "parallel.tensor: 2 needs as many processes, or a multiple; start them by" in told
    assert "torchrun --nproc-per-node 2 -m quiver_trainer" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.pipeline=2", "pipeline parallelism is not offered (pipeline: 2): a base is one module"),
        ("parallel.sequence=true", "sequence cuts tokens over the processes of tensor; set tensor above 1"),
        ("parallel.tensor=0", "parallel.tensor: should be greater than or equal to 1"),
    ],
)
def test_says_what_is_not_offered(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(recipe, [change])


def test_one_process_does_not_import_megatron(recipe: Path, tmp_path: Path) -> None:
    """As where it is not installed."""
    code = (
        "import sys\nsys.modules['megatron'] = None\n"  # every attempt to import it fails
        "from quiver_trainer.cli.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run(tmp_path, "-c", code, recipe)
