"""Recipes: what they say, what overrides change, and what is refused with its line."""

from pathlib import Path

import pytest
from trainer.conftest import load_recipe

from quiver_trainer import ConfigError
from quiver_trainer.recipe.help import list_settings, to_recipe
from quiver_trainer.recipe.methods import LoraSection
from quiver_trainer.recipe.sweep import ManyRecipe, load_recipes

RECIPE = """\
base: models/base
output: adapters/routing
adapter:
  method: lora
  adapter_dim: 4
data:
  train: train.jsonl
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, RECIPE)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_paths_start_at_the_recipe(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path)
    assert config.base == tmp_path / "models/base"
    assert config.output == tmp_path / "adapters/routing"
    assert config.data.train == tmp_path / "train.jsonl"
    assert config.data.validation is None


def test_paths_of_overrides_start_at_the_shell(path: Path) -> None:
    config = load_recipe(path, ["output=there/x", "data.validation=/abs/v.jsonl"])
    assert config.output == Path.cwd() / "there/x"
    assert config.data.validation == Path("/abs/v.jsonl")


def test_overrides_reach_every_depth(path: Path) -> None:
    overrides = ["seed=7", "optimizer.learning_rate=2e-4", "adapter.adapter_dim=9", "adapter.target_modules=[mlp, all]"]
    config = load_recipe(path, [*overrides, "evaluation.interval_steps=null", "schedule.kind=constant"])
    assert config.seed == 7
    assert config.optimizer.learning_rate == 2e-4
    assert config.adapter is not None and isinstance(config.adapter[0], LoraSection)
    assert (config.adapter[0].adapter_dim, config.adapter[0].target_modules) == (9, ("mlp", "all"))
    assert config.schedule.kind == "constant"


def test_a_list_of_methods_is_reached_by_position(tmp_path: Path) -> None:
    text = RECIPE.replace("adapter:\n  method: lora\n  adapter_dim: 4\n", "adapter:\n  - {method: lora}\n")
    config = load_recipe(write(tmp_path, text), ["adapter.0.adapter_dim=3"])
    assert config.adapter is not None and isinstance(config.adapter[0], LoraSection)
    assert config.adapter[0].adapter_dim == 3


def test_null_means_full_fine_tuning(path: Path) -> None:
    assert load_recipe(path, ["adapter=null"]).adapter is None


REFUSED: list[tuple[str, str, str]] = [
    ("adapter_dim: 4", "adapter_dims: 4", r"recipe.yaml:5: adapter.adapter_dims is not a known key; .*--help. lists"),
    ("adapter_dim: 4", "adapter_dim: 0", r"recipe.yaml:5: adapter.adapter_dim: should be greater than or equal to 1"),
    ("adapter_dim: 4", "adapter_dim: '4'", r"recipe.yaml:5: adapter.adapter_dim: should be a valid integer, not \"4\""),
    ("adapter_dim: 4", "alpha: -1", r"recipe.yaml:3: adapter: LoRA: alpha must be above 0, not -1"),
    ("method: lora", "method: lara", r"recipe.yaml:4: adapter.method: should be one of lora, ia3, .*, not \"lara\""),
    ("  method: lora\n", "", r"recipe.yaml:3: adapter.method is required"),
    ("method: lora", "method: ia3", r"recipe.yaml:5: adapter.adapter_dim is not a known key"),
    ("  train: train.jsonl", "  validation: v.jsonl", r"recipe.yaml:6: data.train is required"),
    ("base: models/base\n", "", r"recipe.yaml: base is required"),
    ("output: adapters/routing", "output: adapters/ro uting", r"recipe.yaml:2: output: the folder's name must match"),
    ("base: models/base", "base: models/base\nseed: -1", r"recipe.yaml:2: seed: should be greater than or equal to 0"),
    ("base: models/base", "base: models/base\nbase: again", r"recipe.yaml:2: base is given twice, first in line 1"),
    ("base: models/base", "base: " + "[" * 9000, r"recipe.yaml: not valid YAML: nested too deeply"),
    ("base: models/base", "base: [", r"recipe.yaml:\d+: not valid YAML: "),
    ("base: models/base", "base: models/base\ndevice: tpu", r"recipe.yaml:2: device: .*, not \"tpu\""),
    ("adapter:\n  method: lora\n  adapter_dim: 4\n", "", r"recipe.yaml: adapter is required; write `adapter: null`"),
    ("adapter:\n  method: lora\n  adapter_dim: 4\n", "adapter: []\n", r"recipe.yaml:3: adapter: an empty list trains"),
    (
        "adapter:\n  method: lora\n  adapter_dim: 4\n",
        "adapter: null\ndtype: bfloat16\n",
        r"dtype bfloat16 would lose small updates of the whole base; use float32",
    ),
    ("data:", "optimizer: {betas: [0.9, 1.0]}\ndata:", r"recipe.yaml:6: optimizer.betas: each must be in \[0, 1\)"),
    ("data:", "optimizer: {learning_rate: .nan}\ndata:", r"recipe.yaml:6: optimizer.learning_rate: .*finite number"),
]


@pytest.mark.parametrize(("old", "new", "message"), REFUSED, ids=lambda text: text[:40])
def test_bad_recipes_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, RECIPE.replace(old, new)))


BAD_OVERRIDES: list[tuple[str, str]] = [
    ("seed", r"'seed': an override is key=value, such as"),
    ("=5", r"'=5': an override is key=value"),
    ("seed=x", r"'seed=x': seed: should be a valid integer, not \"x\""),
    ("sead=1", r"'sead=1': sead is not a known key"),
    ("base.name=1", r"'base.name=1': base holds no keys"),
    ("adapter.5.x=1", r"recipe.yaml:3: adapter.5 is not a known key"),
    ("seed=[", r"'seed=\[':1: not valid YAML"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES)
def test_bad_overrides_are_refused(override: str, message: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [override])


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("adapter_dim: 4", "adapter_dim: 0") + "seed: x\nfoo: 1\n"
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 3


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"base: \xff")
    with pytest.raises(ConfigError, match=r"bytes.yaml: not UTF-8"):
        load_recipe(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match=r"recipe.yaml: must hold keys and values"):
        load_recipe(write(tmp_path, "- a\n- b\n"))


@pytest.mark.parametrize("overrides", [[], ["adapter=null"], ["optimizer.max_gradient_norm=null", "data.max_length=9"]])
def test_a_printed_recipe_gives_the_same_run(overrides: list[str], path: Path, tmp_path: Path) -> None:
    config = load_recipe(path, overrides)
    assert load_recipe(write(tmp_path / "..", to_recipe(config))) == config


def test_the_list_of_keys_names_every_one() -> None:
    listed = list_settings()
    for key in ("base", "adapter", "adapter_dim", "rank_pattern", "learning_rate", "warmup_fraction", "too_long"):
        assert f"{key} " in listed or f"{key}:" in listed
    assert "(required)" in listed


@pytest.mark.parametrize("name", ["routing", "extract", "sentiment", "reply"])
def test_the_demos_recipes_are_valid(name: str) -> None:
    config = load_recipe(Path(f"trainer/demo/configs/{name}.yaml"))
    assert config.base.resolve() == Path("trainer/demo/base").resolve()
    assert config.output.name == name


OLD_KEYS = """\
base: models/base
output: adapters
optimiser: {weight_decay: 0.25}
data: {train: train.jsonl}
jobs:
  a: {adapter: {method: lora}, optimiser: {learning_rate: 1e-4}}
  optimiser: {adapter: {method: ia3}}
sweep:
  optimiser.epsilon: [1e-7, 1e-8]
"""


def test_old_key_names_are_read_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, OLD_KEYS)
    with pytest.warns(FutureWarning, match=r"is called optimizer(\.epsilon)? since 0\.2") as caught:
        recipe = load_recipes(path, ["optimiser.max_gradient_norm=2.0"])
    assert [str(warning.message).split(": ")[0] for warning in caught] == [f"{path}:{line}" for line in (3, 6, 9)]
    assert isinstance(recipe, ManyRecipe)
    found = {config.output.name: config.optimizer for config in recipe.configs}
    assert list(found) == [
        "a-epsilon-1e-07",
        "a-epsilon-1e-08",
        "optimiser-epsilon-1e-07",
        "optimiser-epsilon-1e-08",
    ], "a job keeps its name"
    assert {optimizer.weight_decay for optimizer in found.values()} == {0.25}
    assert {optimizer.max_gradient_norm for optimizer in found.values()} == {2.0}
    assert (found["a-epsilon-1e-07"].learning_rate, found["a-epsilon-1e-07"].epsilon) == (1e-4, 1e-7)


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE + "optimizer: {epsilon: 1e-7}\noptimiser: {epsilon: 1e-7}\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml:9: optimizer is given twice, first in line 8"):
        load_recipe(path)
