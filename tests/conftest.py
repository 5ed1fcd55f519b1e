"""Settings of all tests: gRPC is silent; without a GPU, Triton's kernels are interpreted and `cuda` tests skipped."""

import os

import pytest
import torch

# Read when grpc is imported, which is later. Its threads write past pytest's capture, at the ends of connections.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run `make gpu`"))
