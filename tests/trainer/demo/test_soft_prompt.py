"""A soft prompt on the bundled base, trained as a user would: nothing set but the method and the length of the run."""

from pathlib import Path

import pytest
from trainer.conftest import load_recipe

from quiver_demo.dataset import write_dataset
from quiver_peft import load_model
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import Trainer
from quiver_trainer.data.dataset import read_dataset
from quiver_trainer.data.jsonl import Encoder
from quiver_trainer.loop.metrics import exact_match

BASE = Path("trainer/demo/base").resolve()
RECIPE = f"""
base: {BASE}
output: adapter
adapter: {{method: prompt_tuning}}
data: {{train: data/extract/train.jsonl}}
max_steps: 90
epochs: 9
batch_size: 16
"""


@pytest.mark.slow
def test_a_soft_prompt_learns_a_task_that_the_base_does_not_know(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", seed=11, train=1440, validation=0, held_out=60)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load_recipe(tmp_path / "recipe.yaml")
    tokenizer = Tokenizer(BASE)
    path = tmp_path / "data" / "extract" / "held_out.jsonl"
    held_out = read_dataset(path, Encoder(tokenizer, 0, 4096, None))

    def accuracy(model: AnyModel) -> float:
        model.freeze()
        return exact_match(model, tokenizer, held_out, None)

    assert accuracy(load_model(BASE)) == 0.0
    model = load_model(BASE)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)
    served = load_model(BASE)
    served.load_adapters(tmp_path / "adapter")
    # An order number and a name of two or three words among thousands, letter for letter: chance is nothing.
    assert accuracy(served) > 0.8
