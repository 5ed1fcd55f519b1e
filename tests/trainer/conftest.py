"""A tiny base, a data file and a recipe that the tests of this room share; tests that change one make their own."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_llama, tiny_tokenizer

from quiver_trainer import DataSection, EvaluationSection, TrainConfig
from quiver_trainer.recipe.sweep import load_recipes

torch.set_num_threads(1)  # tiny products: threads cost more than they give

ROWS = [
    ("Where is my parcel?", "Shipping"),
    ("The lamp is broken.", "Warranty"),
    ("I was charged twice.", "Billing"),
    ("Please send the charger to my new address, the old one is wrong.", "Shipping"),
    ("I would like to return the box.", "Returns"),
    ("The product does not work any more since last week.", "Warranty"),
]


def write_rows(path: Path, rows: Sequence[tuple[str, str]] = ROWS) -> Path:
    """A JSONL file of prompts and completions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "completion": f" {c}"}) + "\n" for p, c in rows))
    return path


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A recipe of one run, as `quiver train` reads it."""
    config = load_recipes(path, overrides)
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, num_hidden_layers=2)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def make_config(base_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config(name, **settings)`: a configuration whose output is `tmp_path / name`, validated on its own rows."""

    def make(name: str = "out", **settings: Any) -> TrainConfig:
        train = write_rows(tmp_path / "train.jsonl")
        plain: dict[str, Any] = {
            "base": base_folder,
            "output": tmp_path / name,
            "data": DataSection(train=train, validation=train),
            "evaluation": EvaluationSection(exact_match_samples=6),
            "epochs": 2,
            "batch_size": 3,
        }
        return TrainConfig(**{**plain, **settings})

    return make
