"""The compiled kernels, for tests that compare them with their plain forms."""

from collections.abc import Generator

import pytest
import torch

from quiver_peft.kernels.cpp.library import Library, library


@pytest.fixture
def cpp() -> Generator[Library]:
    """The compiled kernels with two threads, gradients off: what serving has."""
    found = library()
    if found is None:
        pytest.skip("needs the compiled kernels: an x86-64 processor with AVX2, g++, and QUIVER_KERNELS unset")
    found.set_num_threads(2)
    with torch.inference_mode():
        yield found
    found.set_num_threads(torch.get_num_threads())
