"""A whole run in this process: it learns, touches nothing but the adapter, and leaves what it promises."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, hf_peft, random_tokens
from trainer.conftest import ROWS, write_rows

from quiver_peft import GPT, LoraPEFTConfig
from quiver_trainer import (
    ConfigError,
    DataError,
    DataSection,
    EvaluationSection,
    OptimizerSection,
    TrainConfig,
    Trainer,
    TrainingError,
)

FAST = OptimizerSection(learning_rate=2e-2, weight_decay=0.0)
MakeConfig = Callable[..., TrainConfig]


def new_model(config: TrainConfig, rank: int = 4) -> GPT:
    model = GPT.from_pretrained(config.base)
    torch.manual_seed(config.seed)
    model.add_adapter(LoraPEFTConfig(adapter_dim=rank, target_modules=["all"]))
    return model


def digest(model: GPT) -> str:
    hashed = hashlib.sha256()
    for parameter in model.base.parameters():
        hashed.update(parameter.detach().numpy().tobytes())
    return hashed.hexdigest()


def test_an_adapter_learns_its_rows_by_heart_and_the_base_stays(make_config: MakeConfig) -> None:
    config = make_config(epochs=40, optimizer=FAST)
    model = new_model(config)
    before = digest(model)
    record = Trainer(config).fit(model).record
    assert digest(model) == before
    assert record["train_loss"] < 0.3 < 3.0 < record["validation_loss_at_start"]
    assert (record["exact_match_at_start"], record["exact_match"]) == (0.0, 1.0)
    answers = Trainer(config).predict(model, [prompt for prompt, _ in ROWS], max_new_tokens=16)
    assert [answer.strip() for answer in answers] == [answer for _, answer in ROWS]


def test_the_folder_is_what_was_trained(make_config: MakeConfig) -> None:
    config = make_config(epochs=4, optimizer=FAST)
    model = new_model(config)
    revision = Trainer(config).fit(model).revision
    tokens = random_tokens(2, 24)
    with torch.inference_mode():
        ours = model(tokens)
    assert_matters(hf_logits(hf_peft(config.base, config.output), tokens), hf_logits(hf_model(config.base), tokens))
    assert_close(ours, hf_logits(hf_peft(config.base, config.output), tokens))
    again = GPT.from_pretrained(config.base)
    again.load_adapters(config.output)
    with torch.inference_mode():
        assert torch.equal(again(tokens), ours)
    record = json.loads((config.output / "quiver.json").read_text())
    assert record["revision"] == revision
    assert record["training"]["data"]["train"]["rows"] == len(ROWS)
    names = {path.name for path in config.output.iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors", "quiver.json"}
    assert names == {*weights, "metrics.jsonl", "learning_curve.png", "README.md"}
    assert [path.name for path in config.output.parent.glob(".*")] == [], "no trace of the work is left"


def test_metrics_tell_the_whole_run(make_config: MakeConfig) -> None:
    config = make_config(epochs=3, evaluation=EvaluationSection(interval_steps=2, exact_match_samples=2))
    Trainer(config).fit(new_model(config))
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train_loss" in line]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in measured] == [0, 2, 4, 6]
    assert trained[-1]["epoch"] == 3.0
    assert trained[-1]["tokens"] > trained[0]["tokens"] > 0
    assert all(line["exact_match"] in (0.0, 0.5, 1.0) for line in measured)


def test_the_curve_is_a_picture(make_config: MakeConfig) -> None:
    config = make_config()
    Trainer(config).fit(new_model(config))
    content = (config.output / "learning_curve.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_the_same_seed_gives_the_same_revision_and_another_seed_another(make_config: MakeConfig) -> None:
    revisions: list[str] = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        config = make_config(name, seed=seed)
        revisions.append(Trainer(config).fit(new_model(config)).revision)
    assert revisions[0] == revisions[1] != revisions[2]


def test_full_fine_tuning_leaves_a_whole_folder(make_config: MakeConfig) -> None:
    config = make_config("whole", epochs=10, optimizer=OptimizerSection(learning_rate=3e-3))
    model = GPT.from_pretrained(config.base)
    Trainer(config).fit(model)
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        assert_close(model(tokens), hf_logits(hf_model(config.output), tokens))
    assert_matters(hf_logits(hf_model(config.output), tokens), hf_logits(hf_model(config.base), tokens))
    assert (config.output / "tokenizer.json").read_bytes() == (config.base / "tokenizer.json").read_bytes()
    served = GPT.from_pretrained(config.output)
    with pytest.raises(AssertionError):
        assert_close(served(tokens), GPT.from_pretrained(config.base)(tokens))


def test_a_finished_run_is_not_done_twice(make_config: MakeConfig) -> None:
    config = make_config()
    first = Trainer(config).fit(new_model(config))
    second = Trainer(config).fit(new_model(config))
    assert second.was_finished and not first.was_finished
    assert second.revision == first.revision
    assert not Trainer(config, restart=True).fit(new_model(config)).was_finished


def test_another_run_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config()
    Trainer(config).fit(new_model(config))
    other = make_config(seed=5)
    with pytest.raises(ConfigError, match=r"holds the result of another run: seed was 0 and is now 5. Choose another"):
        Trainer(other).fit(new_model(other))


def test_a_folder_of_something_else_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config()
    config.output.mkdir()
    (config.output / "letter.txt").write_text("dear diary")
    (config.output / "quiver.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="exists and is not the result of a training; choose another output"):
        Trainer(config, restart=True).fit(new_model(config))
    assert (config.output / "letter.txt").read_text() == "dear diary"


def test_long_rows_are_refused_or_counted(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [*ROWS, ("word " * 40, "yes")])
    with pytest.raises(
        DataError, match=rf"long.jsonl:{len(ROWS) + 1}: prompt \(\d+ tokens\) .* longer than max_length"
    ):
        config = make_config(data=DataSection(train=rows, max_length=60))
        Trainer(config).fit(new_model(config))
    config = make_config(data=DataSection(train=rows, max_length=60, too_long="skip"))
    record = Trainer(config).fit(new_model(config)).record
    assert record["data"]["train"]["rows_skipped"] == 1
    assert record["validation_loss"] is None and record["exact_match"] is None


def test_a_length_beyond_the_base_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    config = make_config(data=DataSection(train=config.data.train, max_length=9999))
    with pytest.raises(ConfigError, match=r"data.max_length: 9999 is more than the 256 tokens of the base"):
        Trainer(config).fit(new_model(config))


def test_a_loss_that_is_no_number_stops_the_run(make_config: MakeConfig) -> None:
    config = make_config(epochs=20, optimizer=OptimizerSection(learning_rate=1e30, max_gradient_norm=None))
    with pytest.raises(TrainingError, match=r"step \d+: the loss is .*Lower optimizer.learning_rate"):
        Trainer(config).fit(new_model(config))
    assert not config.output.exists()


def test_a_frozen_model_cannot_be_trained(make_config: MakeConfig) -> None:
    config = make_config()
    model = new_model(config)
    model.freeze()
    with pytest.raises(TrainingError, match="nothing of this model is trainable"):
        Trainer(config).fit(model)
