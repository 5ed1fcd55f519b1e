"""Runs functions in N real processes that meet over gloo: one Python imports torch and Megatron once, then forks.

    processes.run("function", world=2, **arguments) -> what each rank returned

`torchrun` would import everything in every process of every test, ten seconds each time. The functions are those of
`parallel_cases.py`, named so that a test need not import Megatron; arguments travel as JSON, results as tensors do.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ROOMS = ("proto", "peft", "server", "trainer", "tests")
_LIMIT_SECONDS = 200  # of one call, on a machine with other work
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class RankError(AssertionError):
    """A rank raised or did not end; the message is what the ranks wrote."""


class Processes:
    """The parent that forks. Calls run one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in _ROOMS),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._calls = 0

    def run(self, function: str, *, world: int, **arguments: Any) -> list[Any]:
        """What each of `world` ranks returned of a function of parallel_cases.py. Raises RankError."""
        import torch

        self._calls += 1
        out = self._folder / str(self._calls)
        out.mkdir()
        call = {"function": function, "world": world, "arguments": arguments, "out": str(out)}
        assert self._process.stdin is not None and self._process.stdout is not None
        begin = self._log.seek(0, os.SEEK_END)
        self._process.stdin.write(json.dumps(call, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer.strip() != "ok":
            self._log.seek(begin)
            raise RankError(f"{function}{arguments}: {answer.strip()}\n{self._log.read()[-6000:]}")
        return [torch.load(out / f"{rank}.pt") for rank in range(world)]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()  # it has no children between calls, and its way out takes seconds
        self._process.wait(10)
        self._process.stdout.close()
        self._log.close()


@contextlib.contextmanager
def rank_processes(folder: Path) -> Generator[Processes]:
    """Ready when it is entered, gone when it is left."""
    processes = Processes(folder)
    try:
        yield processes
    finally:
        processes.close()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve() -> None:
    """Forks what is asked for until standard input ends."""
    die_with_parent()
    from support import parallel_cases

    for line in sys.stdin:
        call = json.loads(line)
        port = free_port()
        function = getattr(parallel_cases, call["function"])
        children = [_fork(rank, port, function, call) for rank in range(call["world"])]
        print(_wait(children), flush=True)


def _fork(rank: int, port: int, function: Callable[..., Any], call: dict[str, Any]) -> int:
    import torch

    child = os.fork()
    if child:
        return child
    code = 1
    die_with_parent()
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": call["world"], "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # standard output is the parent's answer
        torch.save(function(**call["arguments"]), Path(call["out"], f"{rank}.pt"))
        code = 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        import multiprocessing.util

        multiprocessing.util._exit_function()  # pyright: ignore[reportAttributeAccessIssue] - checkpoints leave a process
        os._exit(code)


def _wait(children: list[int]) -> str:
    """ "ok", or what went wrong; nobody is left behind."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    running, failed = set(children), False
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                failed = failed or status != 0
        if running and (failed or time.monotonic() > deadline):
            time.sleep(1 if failed else 0)
            for child in running:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return "a rank failed" if failed else f"no end after {_LIMIT_SECONDS} s"
        time.sleep(0.005)
    return "a rank failed" if failed else "ok"


if __name__ == "__main__":
    _serve()
