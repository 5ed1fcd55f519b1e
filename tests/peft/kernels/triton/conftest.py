"""Where the kernels run: interpreted on the CPU, or compiled on a GPU when there is one."""

import pytest
import torch


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="interprets the kernels: run `make test` where there is no GPU"
            ),
        ),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test's tensors."""
    torch.manual_seed(0)
    return torch.device(request.param)
