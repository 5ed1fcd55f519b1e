"""`quiver import`: converts a foreign adapter file to an adapter folder that `quiver serve` loads."""

from pathlib import Path

from quiver_peft.model import load_model
from quiver_trainer.cli.common import run_on_adapter

_DESCRIPTION = """\
Write an adapter that was made elsewhere as a folder for `quiver serve`, checked tensor by tensor against its base.

  quiver import --base models/my-llama --adapter lora.nemo adapters/lora

Reads NeMo 1.x's `.nemo` archives (LoRA, IA3, canonical adapters, P-Tuning and their combinations; every tensor- and
pipeline-parallel layout), AdapterHub's `pytorch_adapter.bin` beside its adapter_config.json, and any adapter folder.
They are read as tensors alone: no code of theirs runs. Folders that Hugging Face PEFT saved as safetensors need no
importing.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_on_adapter("import", _DESCRIPTION, _run, argv)


def _run(base_folder: Path, adapter: Path, output: Path) -> None:
    model = load_model(base_folder)
    model.load_adapters(adapter)
    assert model.adapter is not None
    methods = ", ".join(config.to_dict()["method"] for config in model.adapter.configs)
    revision = model.save_adapter(output.absolute(), base_name=base_folder.name)
    print(f"wrote {output}: {methods} of {adapter.name}, revision {revision[:12]}")
