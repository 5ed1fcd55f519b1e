"""Fixtures of the reliability tests: one tiny base, made once."""

from pathlib import Path

import pytest
import torch
from support.server_fixture import make_base

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer. Not to be changed."""
    return make_base(tmp_path_factory.mktemp("base"))
