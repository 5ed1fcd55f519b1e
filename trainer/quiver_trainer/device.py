"""Which device to compute on."""

import torch

from quiver_peft import device
from quiver_peft.errors import QuiverError
from quiver_trainer.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises ConfigError for a device not there."""
    try:
        return device.choose_device(name)
    except QuiverError as error:
        raise ConfigError(str(error)) from None
