"""`quiver serve`, `train` and others: handed on to their rooms by name, untouched, and explained when not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quiver.dispatch import COMMANDS

PROTO = Path(__file__).parents[2] / "proto"

REPORTS_ITS_ARGUMENTS = """
import sys

def main(argv):
    slow = {"grpc", "google", "rich", "typer"} & sys.modules.keys()
    print("arguments", argv, "slow", sorted(slow))
    return 7
"""


def _install(folder: Path, module: str, source: str) -> None:
    """Writes a package that stands in for a room of Quiver."""
    *packages, name = module.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text(source)


def _quiver(folder: Path, *arguments: str, only_standard_library: bool = False) -> subprocess.CompletedProcess[str]:
    flags = ["-S"] if only_standard_library else []
    return subprocess.run(
        [sys.executable, *flags, "-m", "quiver.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(PROTO))), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reaches_its_package_with_its_arguments_untouched(tmp_path: Path, command: str) -> None:
    _install(tmp_path, COMMANDS[command].module, REPORTS_ITS_ARGUMENTS)
    arguments = ["--help", "--unknown=1", "key=value", "--", "-x", ""]

    run = _quiver(tmp_path, command, *arguments)

    assert run.stdout.strip() == f"arguments {arguments} slow []", run.stderr
    assert run.returncode == 7


@pytest.mark.parametrize("command", COMMANDS)
def test_a_package_that_is_not_installed_is_named_with_the_cure(tmp_path: Path, command: str) -> None:
    extra = "server" if command == "serve" else "trainer"
    run = _quiver(tmp_path, command, "--help", only_standard_library=True)

    assert f"quiver {command} needs the {extra} packages: pip install 'quiver[{extra}]'" in run.stderr
    assert run.stdout == ""
    assert run.returncode == 2


@pytest.mark.parametrize("where", ["at its top", "in main"])
def test_a_requirement_that_is_not_installed_is_named_with_the_cure(tmp_path: Path, where: str) -> None:
    source = "import torch" if where == "at its top" else "def main(argv):\n    import torch"
    _install(tmp_path, "quiver_server.main", source)

    run = _quiver(tmp_path, "serve", only_standard_library=True)

    assert "pip install 'quiver[server]' (No module named 'torch')" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.returncode == 2


def test_a_hole_in_a_package_of_our_own_is_a_bug_and_shown_as_one(tmp_path: Path) -> None:
    _install(tmp_path, "quiver_server.main", "import quiver_server.engine.scheduler")

    run = _quiver(tmp_path, "serve")

    assert "Traceback" in run.stderr and "quiver_server.engine.scheduler" in run.stderr
    assert "pip install" not in run.stderr
    assert run.returncode == 1
