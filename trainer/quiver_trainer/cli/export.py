"""`quiver export`: writes an adapter of any format as Hugging Face PEFT folders."""

from pathlib import Path

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.formats.export import export_adapter
from quiver_peft.base.load import load_base
from quiver_trainer.cli.common import run_on_adapter

_DESCRIPTION = """\
Write an adapter as folders that Hugging Face PEFT loads.

  quiver export --base models/demo-base --adapter adapters/routing exported/routing

What `quiver train` writes for a single method is such a folder already. An adapter of several methods becomes one
folder for each, since Hugging Face PEFT cannot combine them. Canonical adapters have no form there and are refused.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_on_adapter("export", _DESCRIPTION, _run, argv)


def _run(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    base = load_base(base_folder)
    weights = read_adapter(adapter_folder, base)
    for method, folder in export_adapter(output, base, weights, base_folder.name).items():
        print(f"wrote {folder}: {method} of {adapter_folder.name}")
