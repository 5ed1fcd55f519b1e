"""The example recipes: each is valid, says what it is, and trains on rows like those it names."""

from pathlib import Path

import pytest
import yaml

from quiver_trainer import TrainConfig
from quiver_trainer.recipe.methods import METHOD_SECTIONS
from quiver_trainer.recipe.sweep import ManyRecipe, load_recipes

EXAMPLES = Path(__file__).parents[3] / "trainer" / "examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_valid_and_says_what_it_is(path: Path) -> None:
    recipe = load_recipes(path)
    configs = recipe.configs if isinstance(recipe, ManyRecipe) else [recipe]
    assert path.read_text().startswith("# ")
    for config in configs:
        assert (config.base / "config.json").is_file()
        assert config.optimizer.learning_rate is not None and config.data.validation is not None


def test_there_is_one_for_each_method_on_each_base() -> None:
    for kind in ("gpt", "t5"):
        recipes = [load_recipes(path) for path in (EXAMPLES / kind).glob("*.yaml")]
        methods = {s.method for r in recipes if isinstance(r, TrainConfig) for s in r.adapter or ()}
        assert methods == set(METHOD_SECTIONS)
        assert any(isinstance(recipe, TrainConfig) and recipe.adapter is None for recipe in recipes)


def test_rates_are_those_that_were_measured() -> None:
    from bench.methods import METHODS, RUNS

    for kind, runs in RUNS.items():
        for name, run in runs.items():
            path = EXAMPLES / kind / f"{name}.yaml"
            recipe = yaml.safe_load(path.read_text())
            assert float(recipe["optimizer"]["learning_rate"]) == run.learning_rate
            assert recipe["max_steps"] == run.max_steps
            adapter = recipe["adapter"] if isinstance(recipe["adapter"], list) else [recipe["adapter"]]
            for ours, measured in zip(adapter, METHODS[name], strict=True):
                assert all(ours[key] == value for key, value in measured.items()), path
