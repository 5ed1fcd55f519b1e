"""Command line of `quiver merge`, `export` and `import`: base, adapter and output."""

import argparse
from collections.abc import Callable
from pathlib import Path

from quiver_trainer.command import command_parser, run_command
from quiver_trainer.errors import ConfigError


def run_on_adapter(name: str, description: str, action: Callable[[Path, Path, Path], None], argv: list[str]) -> int:
    """Parse, call `action(base, adapter, output)`, and return the exit code."""
    parser = command_parser(f"quiver {name}", description)
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the base")
    parser.add_argument(
        "--adapter", type=Path, required=True, metavar="PATH", help="adapter folder, or the .nemo or .bin file itself"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not be there yet")

    def act(options: argparse.Namespace) -> None:
        if options.output.exists():
            raise ConfigError(f"{options.output}: is there already; remove it, or choose another folder")
        action(options.base, options.adapter, options.output)

    return run_command(parser, argv, act)
