"""Training over ranks ends where training in one process ends: losses, weights, and what a server reads of them."""

import json
import random
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu_train import SIZES, Layout, compare, make_base
from safetensors.torch import load_file
from support.live_server import LiveServer
from support.ranks import Processes, RankError, rank_processes
from support.tiny import EOS, tiny_flan, tiny_llama, tiny_tokenizer
from trainer.conftest import ROWS, write_rows

from quiver_peft.model import load_model
from quiver_trainer import TrainConfig, Trainer
from quiver_trainer.reports.terminal import Reporter

METHODS: dict[str, Any] = {
    "lora": {"method": "lora", "adapter_dim": 4, "target_modules": ["all"]},
    "dora": {"method": "lora", "adapter_dim": 4, "target_modules": ["attention", "mlp"], "use_dora": True},
    "ia3": {"method": "ia3"},
    "canonical": {"method": "canonical", "adapter_dim": 6},
    "ptuning": {"method": "ptuning", "virtual_tokens": 3, "embedding_dim": 8, "bottleneck_dim": 8},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
    "full": None,
}
LAYOUTS = {"tensor": (2, {"tensor": 2}), "data": (2, {}), "both": (4, {"tensor": 2, "sequence": True})}
STEPS = 6


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Generator[Processes]:
    with rank_processes(tmp_path_factory.mktemp("ranks")) as running:
        yield running


@pytest.fixture(scope="module", params=["llama", "flan"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        tiny_llama(folder, num_hidden_layers=2)
    else:
        tiny_flan(folder, num_layers=2, num_decoder_layers=2)
    tiny_tokenizer(folder)
    return folder


def recipe(base: Path, output: Path, method: str, **changes: Any) -> dict[str, Any]:
    """Batches of three rows and of two, so that four ranks and two never have as many each."""
    rows = write_rows(output.parent / "rows.jsonl")
    plain: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "adapter": None if METHODS[method] is None else [METHODS[method]],
        "data": {"train": str(rows), "validation": str(rows)},
        "epochs": 3,
        "batch_size": 2 if method in ("ia3", "canonical") else 5,
        "max_steps": STEPS,
        # Adam makes steps of the whole rate out of gradients that are little but rounding: a base has some, and
        # what lies before a bottleneck's way up, which starts at zero.
        "optimizer": {
            "learning_rate": 3e-4 if method in ("full", "canonical") else 3e-3,
            "weight_decay": 0.1,
            "max_gradient_norm": 0.7,
        },
        "evaluation": {"exact_match_samples": 3, "max_new_tokens": 3},
    }
    own: dict[str, dict[str, Any]] = {
        "canonical": {"accumulation": 2},
        "prefix": {"checkpoint_activations": True},
        "dora": {"evaluation": {**plain["evaluation"], "keep": "best"}},
    }
    return {**plain, **own.get(method, {}), **changes}


def train_alone(recipe: dict[str, Any]) -> None:
    config = TrainConfig.model_validate_json(json.dumps(recipe))
    model = load_model(config.base)
    torch.manual_seed(config.seed)
    if config.adapter is not None:
        model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config, reporter=Reporter(quiet=True, warns=False)).fit(model)


def require_same_training(actual: Path, expected: Path) -> None:
    """Weights, and every loss on the way, validation included."""
    (weights,) = [path.name for path in expected.glob("*.safetensors")]
    ours, theirs = load_file(actual / weights), load_file(expected / weights)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert (ours[name] - tensor).abs().max().item() <= 1e-5, name
    for mine, other in zip(*(read_metrics(folder) for folder in (actual, expected)), strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"seconds", "tokens_per_second"}:
            wanted = other[key] if other[key] is None else pytest.approx(other[key], abs=1e-5, rel=1e-5)
            assert mine[key] == wanted, key


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_equals_one_process(processes: Processes, base: Path, tmp_path: Path) -> None:
    for method in METHODS:
        train_alone(recipe(base, tmp_path / method, method))
    for layout, (world, parallel) in LAYOUTS.items():
        recipes = [recipe(base, tmp_path / f"{method}-{layout}", method, parallel=parallel) for method in METHODS]
        results = processes.run("train", world=world, recipes=recipes)
        assert all(result == results[0] for result in results)
        for method in METHODS:
            require_same_training(tmp_path / f"{method}-{layout}", tmp_path / method)


def read_everything(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("tensor", "one"), ("one", "both")])
def test_goes_on_with_other_ranks(processes: Processes, base: Path, tmp_path: Path, first: str, second: str) -> None:
    """A checkpoint of any layout, stopped by one rank, is gone on from by any other."""
    methods = ("lora", "prefix", "full")
    for method in methods:
        train_alone(recipe(base, tmp_path / f"whole-{method}", method))
    layouts = {**LAYOUTS, "one": (1, {})}
    (world, parallel), (other_world, other_parallel) = layouts[first], layouts[second]
    stopped = [recipe(base, tmp_path / method, method, parallel=parallel) for method in methods]
    told = processes.run("train", world=world, recipes=stopped, stop_after=4)
    assert told[0] == [f"stopped after step 4 of {STEPS}"] * len(methods)
    assert not any((tmp_path / method).exists() for method in methods)
    processes.run("train", world=other_world, recipes=[{**recipe, "parallel": other_parallel} for recipe in stopped])
    for method in methods:
        require_same_training(tmp_path / method, tmp_path / f"whole-{method}")


@pytest.mark.slow
def test_goes_on_to_the_same_bits(processes: Processes, base: Path, tmp_path: Path) -> None:
    """With dropout: its random numbers follow from the step."""
    dropping = {**METHODS["lora"], "adapter_dropout": 0.2}
    layout: dict[str, Any] = {"adapter": [dropping], "parallel": {"tensor": 2, "sequence": True}}
    whole = recipe(base, tmp_path / "whole", "lora", **layout)
    parts = recipe(base, tmp_path / "parts", "lora", **layout)
    processes.run("train", world=4, recipes=[parts], stop_after=4)
    processes.run("train", world=4, recipes=[parts, whole])
    expected = read_everything(tmp_path / "whole")
    for name, tensor in read_everything(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_one_rank_is_killed(processes: Processes, tmp_path: Path) -> None:
    """Three times, at random moments, checkpoints being written or not; the run goes on to the same bits."""
    tiny_llama(tmp_path / "base", num_hidden_layers=1)
    tiny_tokenizer(tmp_path / "base")
    dropping = {**METHODS["lora"], "adapter_dropout": 0.2}
    changes: dict[str, Any] = {"adapter": [dropping], "parallel": {"tensor": 2}, "checkpoint_interval_steps": 1}
    changes |= {"epochs": 30, "max_steps": 12}
    whole, parts = (recipe(tmp_path / "base", tmp_path / name, "lora", **changes) for name in ("whole", "parts"))
    processes.run("train", world=4, recipes=[whole])
    moments = random.Random(6)
    for _ in range(3):
        kill = (moments.randrange(1, 3), moments.uniform(0.0, 0.1))
        with pytest.raises(RankError, match="a rank failed"):
            processes.run("train", world=4, recipes=[parts], kill=kill)
        assert not (tmp_path / "parts").exists(), kill
    processes.run("train", world=4, recipes=[parts])
    expected = read_everything(tmp_path / "whole")
    for name, tensor in read_everything(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_server_answers_as_the_ranks_do(processes: Processes, base: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    methods = [method for method in METHODS if method != "full"]
    recipes = [recipe(base, adapters / method, method, parallel={"tensor": 2}) for method in methods]
    processes.run("train", world=2, recipes=recipes)
    prompts = [prompt for prompt, _ in ROWS]
    folders = [str(adapters / recipe["output"]) for recipe in recipes]
    (trainer_says, _) = processes.run("answers", world=2, base=base, adapters=folders, prompts=prompts)
    assert len({str(answers) for answers in trainer_says}) > 1, "adapters that do nothing answer alike"
    server = LiveServer(base, adapters, tmp_path / "log")
    try:
        with server.client() as client:
            for method, answers in zip(methods, trainer_says, strict=True):
                for prompt, answer in zip(prompts, answers, strict=True):
                    said = client.generate(prompt, adapter=method, max_new_tokens=8).token_ids
                    assert [token for token in said if token != EOS] == answer
    finally:
        server.stop()


@pytest.mark.slow
def test_layouts_of_the_gpu_script_agree(processes: Processes, tmp_path: Path) -> None:
    """What its ranks do, whoever starts them; the command itself: `bench/test_gpu_train.py`."""
    make_base(tmp_path / "base", SIZES["tiny"])

    def losses(layout: Layout) -> dict[str, Any]:
        settings = {**asdict(layout), "size": "tiny", "steps": 5, "device": "cpu"}
        found = processes.run("gpu_train", world=layout.processes, settings=settings, base=tmp_path / "base")
        assert all(rank["losses"] == found[0]["losses"] for rank in found)
        return found[0]

    for dtype in ("float32", "bfloat16"):
        expected = losses(Layout(1, 1, False, True, dtype))["losses"]
        assert expected[-1] != expected[0]
        for tensor, sequence in ((1, False), (2, True)):
            assert compare(losses(Layout(2, tensor, sequence, True, dtype)), expected, dtype)["agrees"]
