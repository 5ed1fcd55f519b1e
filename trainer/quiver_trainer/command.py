"""Shared by the trainer's commands: the parser, error messages and exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence

from quiver.exit_codes import EXIT_CODES, FAILED, MISUSED
from quiver_peft.errors import QuiverError, StoreError, StoreUrlError
from quiver_trainer.errors import TrainingError

_INTERRUPTED = 130  # what shells expect of a program that ends for SIGINT


def command_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help ends with the exit codes."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str], action: Callable[[argparse.Namespace], None]
) -> int:
    """Parse, act, and return the exit code."""
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    try:
        action(options)
    except (QuiverError, OSError) as error:
        return report(parser.prog, error)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return _INTERRUPTED
    return 0


def report(prog: str, error: QuiverError | OSError) -> int:
    """Say on standard error what went wrong; returns the exit code."""
    if isinstance(error, OSError):
        print(f"{prog}: {error.filename or 'reading or writing a file'}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    print(f"{prog}: {error}", file=sys.stderr)
    is_unreachable = isinstance(error, StoreError) and not isinstance(error, StoreUrlError)
    return FAILED if isinstance(error, TrainingError) or is_unreachable else MISUSED
