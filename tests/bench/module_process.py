"""Runs another module of this folder in a process of its own, which takes its threads and memory with it."""

import os
import subprocess
import sys
from pathlib import Path


def run_module(name: str, *arguments: str) -> str:
    """What `python -m bench.<name>` printed. Raises CalledProcessError when it failed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
