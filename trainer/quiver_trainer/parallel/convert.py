"""Converts bases from and to Megatron-Core's distributed checkpoints of GPTModel and T5Model."""

import argparse
import os
import socket
import sys
from pathlib import Path

import torch

from quiver_peft.errors import QuiverError
from quiver_peft.model import load_model
from quiver_peft.parallel.megatron_checkpoint import read_megatron, write_megatron
from quiver_peft.parallel.mesh import start_mesh
from quiver_trainer.command import command_parser, run_command
from quiver_trainer.loop.output import write_base

_DESCRIPTION = """\
Convert between a Hugging Face folder and a distributed checkpoint of Megatron-Core's GPTModel or T5Model:

  python -m quiver_trainer.parallel.convert write --base models/demo-base CHECKPOINT
  python -m quiver_trainer.parallel.convert read --base models/demo-base CHECKPOINT models/trained-by-megatron

What is read becomes a Hugging Face folder (float32); --base says the architecture and lends the tokenizer. Checkpoints
of any tensor- and pipeline-parallel layout are read; the state of an optimizer in them is passed over.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_command(_parser(), argv, _run)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m quiver_trainer.parallel.convert", _DESCRIPTION)
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, what in (("write", "from Hugging Face to Megatron"), ("read", "from Megatron to Hugging Face")):
        direction = directions.add_parser(name, help=what)
        direction.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder")
        direction.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint")
        if name == "read":
            direction.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not be there yet")
    return parser


def _run(options: argparse.Namespace) -> None:
    _single_rank_group()
    with start_mesh(device="cpu"):
        _convert(options)


def _convert(options: argparse.Namespace) -> None:
    model = load_model(options.base, dtype=torch.float32)
    if options.direction == "write":
        write_megatron(model.base, options.checkpoint)
        print(f"wrote {options.checkpoint}")
        return
    if options.output.exists():
        raise QuiverError(f"{options.output}: is there already; remove it, or choose another folder")
    read_megatron(model.base, options.checkpoint)
    options.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_base(model, options.base, options.output.absolute(), {"converted": {"from": "Megatron-Core"}}, {})
    print(f"wrote {options.output}")


def _single_rank_group() -> None:
    """A process group of this process alone."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
