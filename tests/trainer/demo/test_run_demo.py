"""The demo's second half on hardly trained adapters: a real server, an interleaved batch, one adapter that joins."""

import asyncio
from pathlib import Path

import pytest
from trainer.conftest import load_recipe

from quiver_demo import run_demo
from quiver_demo.dataset import write_dataset
from quiver_peft import load_model
from quiver_trainer import Trainer


def train_a_little(work: Path, task: str, output: Path, configs: str) -> None:
    """Two steps by the demo's own recipe: enough for an artefact."""
    overrides = [
        f"output={output}",
        f"data.train={work}/data/{task}/train.jsonl",
        "data.validation=null",
        "max_steps=2",
    ]
    config = load_recipe(run_demo.HERE / configs / f"{task}.yaml", overrides)
    model = load_model(config.base)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "-t5"])
def test_the_story_is_told_on_a_real_server(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", seed=3, train=32, validation=1, held_out=4)
    for task in run_demo.EARLY_TASKS:
        train_a_little(tmp_path, task, tmp_path / "adapters" / task, f"configs{suffix}")
    late = tmp_path / "late" / run_demo.LATE_TASK
    train_a_little(tmp_path, run_demo.LATE_TASK, late, f"configs{suffix}")
    with run_demo.running_server(tmp_path, run_demo.HERE / f"base{suffix}") as address:
        asyncio.run(run_demo.run_demo(tmp_path, address, late, 4))
    printed = capsys.readouterr().out
    for text in ("server ready in", "put into the adapters folder while", "generated tokens per second", "exit code 0"):
        assert text in printed
    assert (tmp_path / "adapters" / run_demo.LATE_TASK / "adapter_config.json").exists()
    assert "Traceback" not in (tmp_path / "server.log").read_text()
