"""Tiny model folders that the tests of this room share; tests that change a folder copy it first."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

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
def model_folders(llama_folder: Path, gpt2_folder: Path) -> dict[str, Path]:
    """Both of them, by family."""
    return {"llama": llama_folder, "gpt2": gpt2_folder}
