"""`load_base`: a GPTBase or T5Base, whichever a folder holds."""

from pathlib import Path

import torch

from quiver_peft.base.checkpoint import read_config
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.errors import CheckpointError
from quiver_peft.kernels.cpp.library import kernel_choice


def load_base(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    keep_storage: bool = False,
    device: str | torch.device = "cpu",
) -> GPTBase | T5Base:
    """Read a Hugging Face folder; dtype, keep_storage: as `Base.from_pretrained`.

    Raises CheckpointError, and QuiverError for kernels that are not known.
    """
    kernel_choice()  # now, not in the middle of a run
    kind = T5Base if read_config(Path(folder))["model_type"] in T5_FAMILIES else GPTBase
    if kind is T5Base and dtype == torch.float16:
        raise CheckpointError(f"{folder}: a T5's feed-forward overflows in float16; use bfloat16 or float32")
    return kind.from_pretrained(folder, dtype=dtype, keep_storage=keep_storage, device=device)
