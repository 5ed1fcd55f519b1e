"""Answers to many prompts: equal to transformers one at a time, and `quiver predict` from file to file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import EOS, hf_greedy, hf_lora, hf_model, random_prompts
from trainer.conftest import ROWS, write_rows

from quiver_peft import GPT, CanonicalAdaptersPEFTConfig, IA3PEFTConfig, LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.cli.predict import main
from quiver_trainer.errors import DataError
from quiver_trainer.loop.predict import is_exact_match, predict_texts, predict_tokens


def test_answers_equal_transformers_one_at_a_time(base_folder: Path, tmp_path: Path) -> None:
    oracle = hf_lora(base_folder, tmp_path / "a", rank=3, targets="all-linear")
    model = GPT.from_pretrained(base_folder)
    model.load_adapters(tmp_path / "a")
    prompts = random_prompts([3, 9, 40, 1, 17, 250])
    answers = predict_tokens(model, prompts, max_new_tokens=12)
    limits = [12, 12, 12, 12, 12, 6]  # the last prompt leaves six places of 256
    assert answers == [hf_greedy(oracle, p, n, [EOS]) for p, n in zip(prompts, limits, strict=True)]


def test_a_prompt_that_fills_the_context_is_refused(base_folder: Path) -> None:
    model = GPT.from_pretrained(base_folder)
    with pytest.raises(DataError, match="prompt 2 has 256 tokens; the base takes 256, answer included"):
        predict_tokens(model, random_prompts([3, 256]), max_new_tokens=1)


def test_training_mode_comes_back(base_folder: Path) -> None:
    model = GPT.from_pretrained(base_folder)
    model.train()
    predict_tokens(model, random_prompts([3]), max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [("a", " a\n", True), ("a b", "a  b", False), ("A", "a", False), ("", " ", True)],
)
def test_exact_match_looks_past_outer_white_space_only(prediction: str, reference: str, same: bool) -> None:
    assert is_exact_match(prediction, reference) == same


def predict(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quiver.cli", "predict", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_the_command_writes_answers_and_counts_the_right_ones(base_folder: Path, tmp_path: Path) -> None:
    oracle, tokenizer = hf_model(base_folder), Tokenizer(base_folder)
    expected = [tokenizer.decode(hf_greedy(oracle, tokenizer.encode(prompt), 5)) for prompt, _ in ROWS]
    rows = [(prompt, answer) for (prompt, _), answer in zip(ROWS, expected, strict=True)]
    rows[0] = (rows[0][0], "something else")
    result = predict(
        "--base", base_folder, "--max-new-tokens", "5", write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    )
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in written] == expected
    assert [row["correct"] for row in written] == [False, True, True, True, True, True]
    assert "wrote 6 answers" in result.stdout and "exact match: 83.3% (5 of 6)" in result.stdout


def test_the_command_answers_with_an_adapter_as_the_library_does(base_folder: Path, tmp_path: Path) -> None:
    """The command's base is packed for inference; DoRA's lengths come from its weights all the same."""
    model = GPT.from_pretrained(base_folder)
    configs = [LoraPEFTConfig(adapter_dim=3, target_modules=["all"], use_dora=True), IA3PEFTConfig()]
    model.add_adapter([PrefixPEFTConfig(virtual_tokens=3), *configs, CanonicalAdaptersPEFTConfig(adapter_dim=4)])
    torch.manual_seed(1)
    for parameter in model.trainable_parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.save_adapter(tmp_path / "adapter")
    prompts = [prompt for prompt, _ in ROWS]
    expected = predict_texts(model, Tokenizer(base_folder), prompts, max_new_tokens=12)
    bare = predict_texts(GPT.from_pretrained(base_folder), Tokenizer(base_folder), prompts, max_new_tokens=12)
    assert all(ours != theirs for ours, theirs in zip(expected, bare, strict=True))
    rows, out = write_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    adapter = ["--adapter", str(tmp_path / "adapter"), "--max-new-tokens", "12"]
    assert main(["--base", str(base_folder), *adapter, str(rows), str(out)]) == 0
    assert [json.loads(line)["prediction"] for line in out.read_text().splitlines()] == expected


def test_bad_input_exits_with_2_and_leaves_the_old_answers(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "in.jsonl").write_text('{"prompt": "ok"}\n{"prompt": 3}\n')
    result = predict("--base", base_folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl", code=2)
    assert result.stderr.startswith("quiver predict: ") and "in.jsonl:2: 'prompt' must be text, not 3" in result.stderr
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a" * 300}) + "\n")
    result = predict("--base", base_folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl", code=2)
    assert "in.jsonl:1: the prompt has" in result.stderr and "fewer than the 256 that the base takes" in result.stderr
    result = predict("--base", tmp_path, tmp_path / "in.jsonl", tmp_path / "out.jsonl", code=2)
    assert "tokenizer.json: no such file" in result.stderr
    (tmp_path / "adapter").mkdir()
    result = predict(
        "--base", base_folder, "--adapter", tmp_path / "adapter", tmp_path / "in.jsonl", tmp_path / "o.jsonl", code=2
    )
    assert "adapter_config.json" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "old"
