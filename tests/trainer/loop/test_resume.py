"""A run that is killed, stopped or left goes on to the very same bits; what does not belong together is refused."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quiver_peft import GPT, LoraPEFTConfig
from quiver_trainer import ConfigError, TrainConfig, Trainer, TrainingError, TrainingInterrupted
from quiver_trainer.loop.checkpoint import read_checkpoint
from quiver_trainer.loop.rng import RunRng
from quiver_trainer.loop.run_directory import RunDirectory
from quiver_trainer.recipe.help import to_recipe

MakeConfig = Callable[..., TrainConfig]
STEPS = 40


def new_model(config: TrainConfig) -> GPT:
    model = GPT.from_pretrained(config.base)
    torch.manual_seed(config.seed)
    # Dropout, so that the state of the random generator matters.
    model.add_adapter(LoraPEFTConfig(adapter_dim=2, target_modules=["all"], adapter_dropout=0.2))
    return model


def long_config(make_config: MakeConfig, name: str) -> TrainConfig:
    return make_config(name, epochs=100, max_steps=STEPS, batch_size=2, checkpoint_interval_steps=4)


def weights(config: TrainConfig) -> bytes:
    return (config.output / "adapter_model.safetensors").read_bytes()


def stop_after(count: int) -> Callable[[], bool]:
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= count


@pytest.mark.parametrize("stops", [(1,), (7,), (8, 13, 3)])
def test_a_stopped_run_goes_on_to_the_same_bits(stops: tuple[int, ...], make_config: MakeConfig) -> None:
    whole, parts = long_config(make_config, "whole"), long_config(make_config, "parts")
    expected = Trainer(whole).fit(new_model(whole))
    done = 0
    for steps in stops:
        done += steps
        with pytest.raises(TrainingInterrupted, match=f"stopped after step {done} of {STEPS}"):
            Trainer(parts, should_stop=stop_after(steps)).fit(new_model(parts))
        assert not parts.output.exists()
    result = Trainer(parts).fit(new_model(parts))
    assert result.revision == expected.revision
    assert weights(parts) == weights(whole)
    assert result.record["tokens"] == expected.record["tokens"]
    assert result.record["validation_loss_at_start"] == expected.record["validation_loss_at_start"]


def test_dropout_goes_on_where_it_was(make_config: MakeConfig) -> None:
    """The state of the generator is part of the checkpoint: without it the bits above could not agree."""
    config = long_config(make_config, "out")
    with pytest.raises(TrainingInterrupted):
        Trainer(config, should_stop=stop_after(5)).fit(new_model(config))
    checkpoint = read_checkpoint(RunDirectory(config.output).checkpoint)
    assert checkpoint is not None
    assert not torch.equal(checkpoint.tensors["random.cpu"], RunRng(config.seed).states["cpu"])


def test_changed_settings_do_not_go_on(make_config: MakeConfig) -> None:
    config = long_config(make_config, "out")
    with pytest.raises(TrainingInterrupted):
        Trainer(config, should_stop=stop_after(5)).fit(new_model(config))
    other = config.model_copy(update={"seed": 9})
    with pytest.raises(ConfigError, match=r"the checkpoint of another run: seed was 0 and is now 9. Undo the change"):
        Trainer(other).fit(new_model(other))
    assert not Trainer(other, restart=True).fit(new_model(other)).was_finished


def test_changed_data_do_not_go_on(make_config: MakeConfig) -> None:
    config = long_config(make_config, "out")
    with pytest.raises(TrainingInterrupted):
        Trainer(config, should_stop=stop_after(5)).fit(new_model(config))
    with config.data.train_files[0].path.open("a") as file:
        file.write(json.dumps({"prompt": "one more", "completion": " row"}) + "\n")
    with pytest.raises(ConfigError, match=r"the checkpoint of another run: data.train was"):
        Trainer(config).fit(new_model(config))


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage", "nested"])
def test_a_damaged_checkpoint_is_refused(damage: str, make_config: MakeConfig) -> None:
    config = long_config(make_config, "out")
    with pytest.raises(TrainingInterrupted):
        Trainer(config, should_stop=stop_after(5)).fit(new_model(config))
    checkpoint = RunDirectory(config.output).checkpoint
    tensors = checkpoint / "state.safetensors"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "remove":
        tensors.unlink()
    else:
        (checkpoint / "state.json").write_text("{" if damage == "garbage" else "[" * 100_000)
    with pytest.raises(TrainingError, match=r"not a whole checkpoint .*start over with --restart"):
        Trainer(config).fit(new_model(config))


def test_two_runs_do_not_share_an_output(make_config: MakeConfig) -> None:
    config = long_config(make_config, "out")
    place = RunDirectory(config.output)
    place.folder.mkdir(parents=True)
    with (place.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another training is at work on this output; wait for it"):
            Trainer(config).fit(new_model(config))
    assert Trainer(config).fit(new_model(config)).record["steps"] == STEPS


# Real processes: what a kill leaves behind is only known after one.


def recipe(config: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / f"{config.output.name}.yaml"
    lora = "adapter:\n  method: lora\n  adapter_dim: 2\n  target_modules: [all]\n  adapter_dropout: 0.2\n"
    path.write_text(to_recipe(config).replace("adapter: null\n", lora))
    return path


def start_training(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "quiver.cli", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(config: TrainConfig, process: subprocess.Popen[str]) -> None:
    state = RunDirectory(config.output).checkpoint / "state.json"
    while not state.exists():
        assert process.poll() is None, "the run ended before it had a checkpoint"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_process_goes_on_to_the_same_bits(
    number: signal.Signals, code: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"epochs": 1000, "max_steps": 150, "batch_size": 2, "checkpoint_interval_steps": 10}
    whole, parts = make_config("whole", **settings), make_config("parts", **settings)
    process = start_training(recipe(parts, tmp_path))
    wait_for_checkpoint(parts, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert not parts.output.exists()
    if number != signal.SIGKILL:
        assert "the same command goes on from there:" in errors and str(tmp_path / "parts.yaml") in errors
    output, errors = start_training(recipe(parts, tmp_path)).communicate(timeout=120)
    assert "going on after step" in output, errors
    Trainer(whole).fit(new_model(whole))
    assert weights(parts) == weights(whole)


@pytest.mark.slow
def test_a_run_killed_at_random_steps_goes_on_to_the_same_bits(make_config: MakeConfig, tmp_path: Path) -> None:
    """QUIVER_KILLS: how often. Whatever lies in the output's place meanwhile is a whole artefact or nothing."""
    kills, seed = int(os.environ.get("QUIVER_KILLS", "2")), random.randrange(10**6)
    generator = random.Random(seed)
    settings = {"epochs": 1000, "max_steps": 60 * (kills + 1), "batch_size": 2, "checkpoint_interval_steps": 3}
    whole, parts = make_config("whole", **settings), make_config("parts", **settings)
    path = recipe(parts, tmp_path)
    for _ in range(kills):
        process = start_training(path)
        metrics = RunDirectory(parts.output).metrics
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        goal = before + generator.randint(5, 30)
        while not metrics.exists() or len(metrics.read_text().splitlines()) < goal:
            assert process.poll() is None, f"seed {seed}: {process.communicate()}"
            time.sleep(0.002)
        time.sleep(generator.random() * 0.03)  # anywhere in a step, or in the writing of a checkpoint
        process.kill()
        process.communicate(timeout=60)
        assert not parts.output.exists()
    output, errors = start_training(path).communicate(timeout=200)
    assert "going on after step" in output, f"seed {seed}: {errors}"
    Trainer(whole).fit(new_model(whole))
    assert weights(parts) == weights(whole), f"seed {seed}"
