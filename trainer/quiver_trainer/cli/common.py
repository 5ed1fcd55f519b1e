"""What `quiver merge`, `export` and `import` share: base, adapter and output on the command line, the exit codes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from quiver_peft.errors import QuiverError


def run_on_adapter(name: str, description: str, action: Callable[[Path, Path, Path], None], argv: list[str]) -> int:
    """Parse, call `action(base, adapter, output)`, and return the exit code.

    0: done, 1: reading or writing failed, 2: something given is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"quiver {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the base")
    parser.add_argument(
        "--adapter", type=Path, required=True, metavar="PATH", help="adapter folder, or the .nemo or .bin file itself"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not be there yet")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    try:
        if options.output.exists():
            raise QuiverError(f"{options.output}: is there already; remove it, or choose another folder")
        action(options.base, options.adapter, options.output)
    except QuiverError as error:
        print(f"quiver {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"quiver {name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
