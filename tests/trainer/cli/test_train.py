"""`quiver train` as a process: what it prints, writes and exits with."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quiver_trainer import TrainConfig

LORA = "adapter:\n  method: lora\n  adapter_dim: 2\n"


@pytest.fixture
def recipe(make_config: Callable[..., TrainConfig], tmp_path: Path) -> Path:
    config = make_config()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {config.base}\noutput: out\n{LORA}data:\n  train: train.jsonl\n  validation: train.jsonl\nepochs: 2\n"
    )
    return path


def quiver(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quiver.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_a_run_tells_what_it_does(recipe: Path, tmp_path: Path) -> None:
    printed = quiver("train", recipe, "seed=3").stdout
    for text in ("out: lora on", "step 0  validation loss", "exact match", "out is trained", "revision"):
        assert text in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    again = quiver("train", recipe, "seed=3")
    assert "this training is finished already; --restart trains again" in again.stdout
    other = quiver("train", recipe, "seed=4", code=2)
    assert "holds the result of another run: seed was 3 and is now 4" in other.stderr


def test_print_config_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    printed = quiver("train", recipe, "--print-config").stdout
    assert "\n  learning_rate: null" in printed
    assert not (tmp_path / "out").exists()


def test_help_teaches() -> None:
    printed = quiver("train", "--help").stdout
    for text in ("quiver train routing.yaml epochs=5", "adapter_dim", "Exit codes:", "--restart"):
        assert text in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: 2", "epochs: zwei"), 'recipe.yaml:9: epochs: should be a valid integer, not "zwei"'),
        (("train: train.jsonl", "train: none.jsonl"), "none.jsonl: cannot be read: No such file or directory"),
        (("output: out", "output: ../../"), "the folder's name must match"),
        (("device", ""), ""),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    change: tuple[str, str], message: str, recipe: Path, tmp_path: Path
) -> None:
    old, new = change
    recipe.write_text(recipe.read_text().replace(old, new))
    if not message:
        recipe.write_text(recipe.read_text() + "device: cuda:77\n")
        message = "device 'cuda:77' does not exist"
    result = quiver("train", recipe, code=2)
    assert result.stderr.startswith("quiver train: ") and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_named_with_file_and_line(recipe: Path, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "half a row"')
    result = quiver("train", recipe, code=2)
    assert "train.jsonl:7: not valid JSON:" in result.stderr


def test_a_base_that_is_none_is_named(recipe: Path, tmp_path: Path) -> None:
    result = quiver("train", recipe, f"base={tmp_path}", code=2)
    assert str(tmp_path) in result.stderr and "no model.safetensors" in result.stderr


def test_a_failed_run_exits_with_1(recipe: Path) -> None:
    result = quiver(
        "train", recipe, "optimizer.learning_rate=1e30", "optimizer.max_gradient_norm=null", "epochs=9", code=1
    )
    assert "Lower optimizer.learning_rate" in result.stderr
