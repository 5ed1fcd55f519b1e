"""A recipe of many runs: what jobs share and own, what a sweep makes of them, the command from end to end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer.cli.test_train import quiver
from trainer.conftest import write_rows

from quiver_trainer import ConfigError, TrainConfig
from quiver_trainer.recipe.sweep import ManyRecipe, load_recipes

RECIPE = """\
base: base
output: adapters
batch_size: 4
optimizer: {learning_rate: 1e-3, weight_decay: 0.5}
data: {validation: all.jsonl}
jobs:
  routing:
    adapter: {method: lora, adapter_dim: 4}
    data: {train: routing.jsonl}
  extract:
    adapter: [{method: ia3}, {method: canonical}]
    data: {train: extract.jsonl}
    optimizer: {learning_rate: 5e-3}
    epochs: 7
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "many.yaml"
    path.write_text(text)
    return path


def load(tmp_path: Path, text: str, *overrides: str) -> ManyRecipe:
    recipe = load_recipes(write(tmp_path, text), overrides)
    assert isinstance(recipe, ManyRecipe)
    return recipe


def test_jobs_share_what_is_not_their_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE)
    routing, extract = recipe.configs
    assert recipe.folder == tmp_path / "adapters" and recipe.pass_tokens == 4096
    assert [config.output for config in recipe.configs] == [tmp_path / "adapters" / n for n in ("routing", "extract")]
    assert routing.data.train == tmp_path / "routing.jsonl" and extract.data.validation == tmp_path / "all.jsonl"
    assert (routing.optimizer.learning_rate, extract.optimizer.learning_rate) == (1e-3, 5e-3)
    assert extract.optimizer.weight_decay == 0.5 and (routing.epochs, extract.epochs) == (3, 7)
    assert [section.method for section in extract.adapter or ()] == ["ia3", "canonical"]


def test_a_sweep_is_every_value_with_every_other(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE + "sweep:\n  seed: [1, 2]\n  optimizer.learning_rate: [1e-4, 2.5e-3]\n")
    assert [config.output.name for config in recipe.configs][:4] == [
        "routing-seed-1-learning_rate-0.0001",
        "routing-seed-1-learning_rate-0.0025",
        "routing-seed-2-learning_rate-0.0001",
        "routing-seed-2-learning_rate-0.0025",
    ]
    assert [(c.seed, c.optimizer.learning_rate) for c in recipe.configs[4:]] == [
        (1, 1e-4), (1, 2.5e-3), (2, 1e-4), (2, 2.5e-3)
    ]  # fmt: skip


def test_a_sweep_over_methods_needs_no_jobs(tmp_path: Path) -> None:
    shared = "base: b\noutput: out\ndata: {train: t.jsonl}\n"
    sweep = "sweep:\n  adapter:\n    - {method: lora, adapter_dim: 8}\n    - [{method: ia3}, {method: canonical}]\n"
    recipe = load(tmp_path, shared + sweep)
    assert [config.output.name for config in recipe.configs] == ["lora-8", "ia3-canonical"]


def test_overrides_reach_every_run(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE, "epochs=2", "pass_tokens=99", "jobs.extract.seed=5", f"output={tmp_path / 'x'}")
    assert [config.epochs for config in recipe.configs] == [2, 2]
    assert [config.seed for config in recipe.configs] == [0, 5]
    assert recipe.pass_tokens == 99 and recipe.folder == tmp_path / "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("epochs: 7", "epochs: zwei"), 'many.yaml:14: epochs: should be a valid integer, not "zwei"'),
        (RECIPE.replace("batch_size: 4", "batch_size: -4"), "many.yaml:3: batch_size: should be greater than"),
        (RECIPE.replace("    epochs: 7", "    base: other"), "many.yaml: base must be the same for all jobs"),
        (RECIPE.replace("    epochs: 7", "    output: o"), "jobs.extract: must hold keys of a recipe, and no output"),
        (RECIPE + "sweep: {seed: 4}\n", "sweep must hold lists of values"),
        (RECIPE + "sweep: {seed: [4, 4]}\n", "two runs would both be called routing-seed-4"),
        (RECIPE + "sweep: {seed: [x]}\n", "'seed=\"x\"': seed: should be a valid integer"),
        (RECIPE + "pass_tokens: 0\n", "pass_tokens must be a whole number above zero, not 0"),
        (RECIPE.replace("output: adapters\n", ""), "output must be a folder, not None"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipes(write(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_command_trains_all_and_compares_them(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    base = make_config().base
    write_rows(tmp_path / "rows.jsonl")
    path = write(
        tmp_path,
        f"base: {base}\noutput: adapters\nmax_steps: 3\ndata: {{train: rows.jsonl, validation: rows.jsonl}}\n"
        "sweep:\n  adapter:\n    - {method: lora, adapter_dim: 2}\n    - {method: ia3}\n",
    )
    printed = quiver("train", path).stdout
    assert "2 adapters on base" in printed and "lora-2  step 3  validation loss" in printed
    table = (tmp_path / "adapters" / "comparison.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| run", "| ---", "| lora-2", "| ia3"]
    loss = json.loads((tmp_path / "adapters" / "ia3" / "quiver.json").read_text())["training"]["validation_loss"]
    assert f" | {loss:.4f} | " in table[3]
    assert (tmp_path / "adapters" / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "lora-2" in quiver("train", path).stdout, "what is finished is compared again"
