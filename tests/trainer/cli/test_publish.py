"""`quiver publish`: what is as good as it says is put into the store in one step, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import edit_json, edit_tensors, tiny_llama, tiny_tokenizer
from trainer.loop.test_options import LORA, fit

from quiver_peft import GPT
from quiver_trainer import OptimizerSection, TrainConfig
from quiver_trainer.cli.publish import main


@pytest.fixture
def trained(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    config = make_config("routing", adapter=[LORA], epochs=4, optimizer=OptimizerSection(learning_rate=2e-2))
    fit(config)
    return config


def publish(config: TrainConfig, store: Path, *options: str) -> int:
    rows = str(config.data.train_files[0].path)
    return main(["--base", str(config.base), "--validation", rows, *options, str(config.output), str(store)])


def test_what_is_as_good_as_it_says_is_in_the_store(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(trained, tmp_path / "store") == 0
    assert "published routing as revision" in capsys.readouterr().out
    names = [sorted(p.name for p in folder.iterdir()) for folder in (trained.output, tmp_path / "store" / "routing")]
    assert names[0] == names[1]
    served = GPT.from_pretrained(trained.base)
    served.load_adapters(tmp_path / "store" / "routing")
    assert publish(trained, tmp_path / "store", "--id", "other") == 0
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["other", "routing"]


def test_what_is_not_as_good_is_not(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = trained.output / "quiver.json"
    training = json.loads(record.read_text())["training"]
    edit_json(record, training={**training, "validation_loss": training["validation_loss"] - 0.1})
    assert publish(trained, tmp_path / "store") == 2
    assert "validation loss is" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_what_does_not_load_is_not(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensors(trained.output / "adapter_model.safetensors", lambda tensors: tensors.popitem())
    assert publish(trained, tmp_path / "store") == 2
    assert "the files beside it are not the ones it describes" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_another_base_other_rows_and_no_rows_are_refused(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_llama(other, seed=9)
    tiny_tokenizer(other)
    assert publish(trained.model_copy(update={"base": other}), tmp_path / "store") == 2
    assert "this base is" in capsys.readouterr().err
    rows = tmp_path / "other.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    base = ["--base", str(trained.base)]
    assert main([*base, "--validation", str(rows), str(trained.output), str(tmp_path / "store")]) == 2
    assert "is not the file that" in capsys.readouterr().err
    assert main([*base, str(trained.output), str(tmp_path / "store")]) == 2
    assert "--validation FILE is needed" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    assert main([*base, "--unmeasured", str(trained.output), str(tmp_path / "store")]) == 0
