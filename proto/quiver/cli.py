"""The `quiver` command. Imports nothing slow until it is known which command runs."""

import sys

from quiver.dispatch import COMMANDS, run_command


def main() -> int:
    """Runs the command in `sys.argv` and returns the exit code: see `quiver.exit_codes`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:])
    # Here and not above: typer, rich and gRPC take half a second that `quiver serve` must not spend.
    from quiver.commands import app

    app(prog_name="quiver")
    return 0


if __name__ == "__main__":
    sys.exit(main())
