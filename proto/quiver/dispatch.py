"""Hands `quiver serve`, `train`, `predict`, `publish`, `merge`, `export`, `import` to the packages that have them.

Standard library only: the server installs its SIGTERM handler in `quiver_server.main`, and nothing slow may
be imported before it.
"""

import importlib
import sys
from typing import NamedTuple

from quiver.exit_codes import MISUSED


class Command(NamedTuple):
    """A package that implements commands, and the extra of `pip install` that brings what it needs."""

    module: str  # has `main(argv: list[str]) -> int`
    extra: str


COMMANDS = {
    "serve": Command("quiver_server.main", "server"),
    "train": Command("quiver_trainer.cli.train", "trainer"),
    "predict": Command("quiver_trainer.cli.predict", "trainer"),
    "publish": Command("quiver_trainer.cli.publish", "trainer"),
    "merge": Command("quiver_trainer.cli.merge", "trainer"),
    "export": Command("quiver_trainer.cli.export", "trainer"),
    "import": Command("quiver_trainer.cli.import_adapter", "trainer"),
}


def run_command(command: str, arguments: list[str]) -> int:
    """Runs `command` with `arguments` untouched. Returns its exit code; MISUSED when a package is not installed."""
    room = COMMANDS[command]
    try:
        exit_code: int = importlib.import_module(room.module).main(arguments)
    except ModuleNotFoundError as error:
        if _is_our_own_fault(error.name or "", room):
            raise
        print(
            f"quiver {command} needs the {room.extra} packages: pip install 'quiver[{room.extra}]' ({error})",
            file=sys.stderr,
        )
        return MISUSED
    return exit_code


def _is_our_own_fault(missing: str, room: Command) -> bool:
    """Whether the missing module should be there: one inside a package of ours that is itself installed."""
    package = room.module.partition(".")[0]
    return missing != package and missing.partition(".")[0] in (package, "quiver", "quiver_peft")
