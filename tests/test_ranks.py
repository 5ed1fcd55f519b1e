"""Nothing that the parallel tests start outlives them, however they end."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, sys, time
from support.ranks import die_with_parent
if os.fork() == 0:
    die_with_parent()
    print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_dies_with_its_parent() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.communicate(timeout=10) == ("", None)  # it ends when nobody has it open any more
