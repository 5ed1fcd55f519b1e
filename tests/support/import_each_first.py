"""Imports each module named on the command line as the first of ours, in a forked process; exits with the failures.

A program of its own: it imports all modules once, so that third-party packages are paid for once, then forgets ours.
"""

import contextlib
import importlib
import os
import sys
import traceback


def import_first(name: str) -> bool:
    """Whether `name` can be imported in a fork of this process; prints why not."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"cannot import {name} first:")
            traceback.print_exc(limit=-2, file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(names: list[str]) -> int:
    for name in names:
        with contextlib.suppress(ImportError):  # import_first prints it
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("quiver")]:
        del sys.modules[name]
    return min(sum(not import_first(name) for name in names), 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
