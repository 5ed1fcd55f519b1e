"""`torchrun`, but with the exit code of the process that failed first: `python -m quiver_trainer.parallel.torchrun`.

torchrun itself exits with 1 whatever failed; a supervisor must tell a wrong recipe (2) from a lost node.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: list[str]) -> int:
    """Start the processes, as torchrun's options say, and wait for them."""
    try:
        torchrun(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # below 0: ended by a signal
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
