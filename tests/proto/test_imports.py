"""What importing the client loads: never torch, and nothing slow before a command is known."""

import subprocess
import sys
from pathlib import Path

import pytest

import quiver

PROTO = Path(__file__).parents[2] / "proto"


def _loaded_by(statement: str, heavy: set[str]) -> set[str]:
    """Which of the `heavy` modules a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*({heavy!r} & sys.modules.keys()))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(PROTO), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["quiver", "quiver.cli", "quiver.client", "quiver.aio", "quiver.commands", "quiver.v1.generation_pb2_grpc"],
)
def test_no_module_of_the_client_loads_torch(module: str) -> None:
    heavy = {"torch", "numpy", "transformers", "quiver_peft", "quiver_server", "quiver_trainer"}

    assert _loaded_by(f"import {module}", heavy) == set()


@pytest.mark.parametrize("module", ["quiver", "quiver.cli", "quiver.dispatch"])
def test_the_way_to_the_server_loads_nothing_slow(module: str) -> None:
    heavy = {"grpc", "google.protobuf", "rich", "typer", "asyncio", "dataclasses"}

    assert _loaded_by(f"import {module}", heavy) == set()


def test_the_probe_itself_sees_what_is_loaded() -> None:
    assert _loaded_by("from quiver import Client", {"grpc", "rich"}) == {"grpc"}


@pytest.mark.parametrize("name", quiver.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(quiver, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        getattr(quiver, "Clint")  # noqa: B009  # the type checker knows that it is not there
