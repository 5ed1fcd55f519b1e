"""`quiver merge`: folds an adapter into its base and writes a Hugging Face folder."""

from pathlib import Path

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.merge import merge_into
from quiver_peft.model import load_model
from quiver_trainer.cli.common import run_on_adapter
from quiver_trainer.loop.output import write_base

_DESCRIPTION = """\
Fold an adapter into its base and write the result as a Hugging Face folder (float32) that answers as the two together.

  quiver merge --base models/demo-base --adapter adapters/routing models/demo-routing

LoRA, DoRA and IA3 can be folded in, alone and combined. Virtual tokens, prefixes and canonical adapters cannot: they
are no change of weights. Serving adapters beside their base needs no merging.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_on_adapter("merge", _DESCRIPTION, _run, argv)


def _run(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    model = load_model(base_folder)
    weights = read_adapter(adapter_folder, model.base)
    merge_into(model.base, weights)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    record = {"merged": {"base_fingerprint": model.base.fingerprint, "adapter_revision": weights.revision}}
    write_base(model, base_folder, output.absolute(), record, {})
    print(f"wrote {output}: {base_folder.name} with {adapter_folder.name} ({', '.join(weights.methods)}) folded in")
