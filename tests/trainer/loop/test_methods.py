"""Every method trains, is measured, saved, read again and predicted with, by the same loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import MAX_POSITIONS
from trainer.conftest import ROWS, load_recipe

from quiver_peft import GPT
from quiver_trainer import ConfigError, OptimizerSection, TrainConfig, Trainer

MakeConfig = Callable[..., TrainConfig]
LEARNS: dict[str, tuple[list[dict[str, Any]], float]] = {
    "dora": ([{"method": "lora", "adapter_dim": 4, "target_modules": ["all"], "use_dora": True}], 2e-2),
    "ia3": ([{"method": "ia3"}], 5e-2),
    "canonical": ([{"method": "canonical", "adapter_dim": 8}], 1e-2),
    "ptuning": ([{"method": "ptuning", "virtual_tokens": 8, "encoder": "mlp"}], 5e-3),
    "prompt_tuning": ([{"method": "prompt_tuning", "virtual_tokens": 8}], 5e-2),
    "prefix": ([{"method": "prefix", "virtual_tokens": 8}], 5e-2),
    "ptuning + canonical": (
        [{"method": "ptuning", "virtual_tokens": 4, "encoder": "mlp"}, {"method": "canonical", "adapter_dim": 8}],
        1e-2,
    ),
}


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_and_predicts_what_it_was_measured_at(name: str, make_config: MakeConfig) -> None:
    methods, learning_rate = LEARNS[name]
    optimizer = OptimizerSection(learning_rate=learning_rate, weight_decay=0.0)
    config = make_config(epochs=40, optimizer=optimizer, adapter=methods)
    model = GPT.from_pretrained(config.base)
    torch.manual_seed(0)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    record = Trainer(config).fit(model).record
    assert record["validation_loss"] < 0.85 * record["validation_loss_at_start"]
    prompts = [prompt for prompt, _ in ROWS]
    again = GPT.from_pretrained(config.base)
    again.load_adapters(config.output)
    answers = Trainer(config).predict(again, prompts, max_new_tokens=12)
    assert answers == Trainer(config).predict(model, prompts, max_new_tokens=12)
    right = sum(answer.strip() == expected for answer, (_, expected) in zip(answers, ROWS, strict=True))
    assert right / len(ROWS) == pytest.approx(record["exact_match"])


def test_virtual_tokens_count_against_the_context(make_config: MakeConfig) -> None:
    config = make_config(adapter=[{"method": "prompt_tuning", "virtual_tokens": 10}])
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": MAX_POSITIONS - 9})})
    model = GPT.from_pretrained(config.base)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    with pytest.raises(ConfigError, match="247 is more than the 246 tokens of the base beside 10 virtual tokens"):
        Trainer(config).fit(model)


def test_a_recipe_may_list_methods(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: b\noutput: o\ndata: {train: t.jsonl}\nadapter:\n"
        "  - {method: ptuning, virtual_tokens: 3}\n  - {method: canonical, places: [mlp]}\n  - {method: ia3}\n"
    )
    sections = load_recipe(path).adapter
    assert sections is not None
    assert [section.to_peft().to_dict()["method"] for section in sections] == ["ptuning", "canonical", "ia3"]
