"""`quiver export`: an adapter as Hugging Face PEFT folders, wherever it was made."""

import argparse
import sys
from pathlib import Path

from quiver_peft.adapters.artifact import read_adapter
from quiver_peft.adapters.export import export_adapter
from quiver_peft.base.load import load_base
from quiver_peft.errors import QuiverError

_DESCRIPTION = """\
Write an adapter as folders that Hugging Face PEFT loads.

  quiver export --base models/demo-base --adapter adapters/routing exported/routing

What `quiver train` writes for a single method is such a folder already. An adapter of several methods becomes one
folder for each, since Hugging Face PEFT cannot combine them. Canonical adapters have no form there and are refused.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code: 0 done, 1 reading or writing failed, 2 something given is wrong."""
    parser = argparse.ArgumentParser(
        prog="quiver export", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the base")
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="adapter folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not be there yet")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    try:
        _run(options.base, options.adapter, options.output)
    except QuiverError as error:
        print(f"quiver export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"quiver export: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _run(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    if output.exists():
        raise QuiverError(f"{output}: is there already; remove it, or choose another folder")
    base = load_base(base_folder)
    weights = read_adapter(adapter_folder, base)
    for method, folder in export_adapter(output, base, weights, base_folder.name).items():
        print(f"wrote {folder}: {method} of {adapter_folder.name}")
