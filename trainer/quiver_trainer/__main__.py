"""`python -m quiver_trainer`: `quiver train`, as torchrun starts it in every process."""

import sys

from quiver_trainer.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
