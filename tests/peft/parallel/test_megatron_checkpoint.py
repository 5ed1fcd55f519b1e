"""A base written for Megatron-Core answers as its own model there, and one that Megatron wrote as it does here."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from support.ranks import Processes, rank_processes
from support.tiny import hf_model, random_tokens, tiny_flan, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

CONVERT = "python -m quiver_trainer.parallel.convert"
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5, "flan": tiny_flan}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Generator[Processes]:
    with rank_processes(tmp_path_factory.mktemp("ranks")) as running:
        yield running


@pytest.fixture(params=MAKERS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    MAKERS[request.param](tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
def test_megatrons_own_model_gives_the_same_logits(processes: Processes, base: Path, tmp_path: Path) -> None:
    (differences,) = processes.run("megatron_both_ways", world=1, folder=base, scratch=tmp_path)
    assert differences["written"] <= 1e-4
    assert differences["read"] <= 1e-4
    assert differences["before"] > 0.1, "without the checkpoint the answers are others"


@pytest.mark.slow
def test_a_checkpoint_of_something_else_is_refused(processes: Processes, base: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "deeper", num_hidden_layers=5)
    (told,) = processes.run(
        "megatron_refusal", world=1, folder=base, other=tmp_path / "deeper", scratch=tmp_path / "checkpoint"
    )
    assert told.startswith(f"{tmp_path / 'checkpoint'}: not a checkpoint of this architecture: ")


@pytest.mark.slow
def test_the_command_converts_there_and_back(processes: Processes, tmp_path: Path) -> None:
    def convert(*words: str | Path) -> tuple[int, str, str]:
        return processes.run("convert_bases", world=1, words=list(map(str, words)))[0]

    tiny_llama(tmp_path / "base", num_hidden_layers=2)
    tiny_tokenizer(tmp_path / "base")
    # Of the same architecture, other weights: those that are read must come from the checkpoint.
    tiny_llama(tmp_path / "other", num_hidden_layers=2, seed=9)
    tiny_tokenizer(tmp_path / "other")
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "made" / "back"
    assert convert("write", "--base", tmp_path / "base", checkpoint) == (0, f"wrote {checkpoint}\n", "")
    read = ("read", "--base", tmp_path / "other", checkpoint)
    assert convert(*read, back) == (0, f"wrote {back}\n", "")
    tokens = random_tokens(2, 9)
    expected, found = (hf_model(folder)(tokens).logits for folder in (tmp_path / "base", back))
    assert torch.equal(found, expected)
    assert (back / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    code, printed, told = convert(*read, back)
    assert (code, printed) == (2, "")
    assert told == f"{CONVERT}: {back}: is there already; remove it, or choose another folder\n"
    code, printed, told = convert("read", "--base", tmp_path / "base", tmp_path / "nothing", tmp_path / "out")
    assert (code, printed) == (2, "") and told.startswith(f"{CONVERT}: {tmp_path / 'nothing'}: ")
    assert not (tmp_path / "out").exists()
    assert convert("write", "--base", tmp_path / "nothing", tmp_path / "out")[0] == 2
    assert convert("write")[0] == 2
