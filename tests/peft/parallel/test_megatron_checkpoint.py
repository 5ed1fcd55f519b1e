"""A base written for Megatron-Core answers as its own model there, and one that Megatron wrote as it does here."""

from collections.abc import Generator
from pathlib import Path

import pytest
from ranks import Processes, rank_processes
from tiny import tiny_flan, tiny_gpt2, tiny_llama, tiny_t5

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
