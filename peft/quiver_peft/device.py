"""Which device to compute on."""

import re

import torch

from quiver_peft.errors import QuiverError


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises QuiverError for a device not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise QuiverError(f"device: {name} is not known; it must be auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuiverError(f"device: {name} is not there ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    return device
