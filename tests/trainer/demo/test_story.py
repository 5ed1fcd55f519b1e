"""The demo's second half on hardly trained adapters: a real server, an interleaved batch, one adapter that joins."""

import asyncio
from pathlib import Path

import pytest
from trainer.conftest import load_recipe

from quiver_peft import load_model
from quiver_trainer import Trainer
from quiver_trainer.demo import story
from quiver_trainer.demo.desk import write_dataset


def train_a_little(work: Path, task: str, output: Path, configs: str) -> None:
    """Two steps by the demo's own recipe: enough for an artefact."""
    overrides = [
        f"output={output}",
        f"data.train={work}/data/{task}/train.jsonl",
        "data.validation=null",
        "max_steps=2",
    ]
    config = load_recipe(story.HERE / configs / f"{task}.yaml", overrides)
    model = load_model(config.base)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "-t5"])
def test_the_story_is_told_on_a_real_server(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", seed=3, train=32, validation=1, held_out=4)
    for task in story.EARLY_TASKS:
        train_a_little(tmp_path, task, tmp_path / "adapters" / task, f"configs{suffix}")
    late = tmp_path / "late" / story.LATE_TASK
    train_a_little(tmp_path, story.LATE_TASK, late, f"configs{suffix}")
    with story.running_server(tmp_path, story.HERE / f"base{suffix}") as address:
        asyncio.run(story.tell(tmp_path, address, late, 4))
    printed = capsys.readouterr().out
    for text in ("server ready in", "put into the adapters folder while", "generated tokens per second", "exit code 0"):
        assert text in printed
    assert (tmp_path / "adapters" / story.LATE_TASK / "adapter_config.json").exists()
    assert "Traceback" not in (tmp_path / "server.log").read_text()
