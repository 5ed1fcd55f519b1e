"""Tiny model folders that the tests of this room share; tests that change a folder copy it first."""

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_flan, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

torch.set_num_threads(1)  # tiny products: threads cost more than they give


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(llama_folder: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both of them, and a T5 of either form, by family."""
    t5, flan = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("flan")
    tiny_t5(t5)
    tiny_flan(flan)
    return {"llama": llama_folder, "gpt2": gpt2_folder, "t5": t5, "flan": flan}
