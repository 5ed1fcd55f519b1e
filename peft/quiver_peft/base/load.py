"""`load_base`: a GPTBase or T5Base, whichever a folder holds."""

from pathlib import Path

import torch

from quiver_peft.base.checkpoint import read_config
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.errors import CheckpointError


def load_base(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPTBase | T5Base:
    """Read a Hugging Face folder. Raises CheckpointError."""
    kind = T5Base if read_config(Path(folder))["model_type"] in T5_FAMILIES else GPTBase
    if kind is T5Base and dtype == torch.float16:
        raise CheckpointError(f"{folder}: a T5's feed-forward overflows in float16; use bfloat16 or float32")
    return kind.from_pretrained(folder, dtype=dtype, device=device)
