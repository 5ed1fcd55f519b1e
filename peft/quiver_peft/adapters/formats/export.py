"""An adapter as folders that Hugging Face PEFT loads: one for each of its methods."""

import json
from pathlib import Path

from safetensors.torch import save

from quiver_peft.adapters.formats.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from quiver_peft.adapters.formats.methods import write_method
from quiver_peft.adapters.methods.configs import method_name
from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError
from quiver_peft.files.atomic_folder import replace_folder

NOT_IN_PEFT = ("canonical",)


def export_adapter(folder: Path, base: Base, weights: AdapterWeights, base_name: str) -> dict[str, Path]:
    """Write it, and return {method: folder}: `folder` itself for a single method, else a subfolder for each.

    Raises AdapterError, and writes nothing, for a method that Hugging Face PEFT does not have.
    """
    for method in weights.methods:
        if method in NOT_IN_PEFT:
            raise AdapterError(f"method {method!r} cannot be exported: Hugging Face PEFT has no form for it")
    written: dict[str, Path] = {}
    for config in weights.configs:
        method = method_name(config)
        written[method] = folder if len(weights.configs) == 1 else folder / method
        settings, tensors = write_method(base, config, weights, base_name)
        files = {
            CONFIG_FILE: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
            WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        }
        written[method].parent.mkdir(parents=True, exist_ok=True)
        replace_folder(written[method], files)
    return written
