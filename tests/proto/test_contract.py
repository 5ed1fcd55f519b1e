"""The committed stubs are those of the .proto files; buf checks their style and compatibility in `make lint`."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"


def _generator_of_the_committed_stubs() -> str:
    text = (PROTO / "quiver" / "v1" / "generation_pb2_grpc.py").read_text("utf-8")
    found = re.search(r"GRPC_GENERATED_VERSION = '([^']+)'", text)
    assert found
    return found.group(1)


def test_committed_stubs_match_the_proto_files(tmp_path: Path) -> None:
    generator = _generator_of_the_committed_stubs()
    if version("grpcio-tools") != generator:
        pytest.skip(f"needs grpcio-tools {generator}, which wrote the stubs: run `make setup`")
    sources = sorted((PROTO / "quiver" / "v1").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *plugins, *outputs, *map(str, sources)]
    subprocess.run(command, check=True, capture_output=True)

    fresh = {path.name: path.read_text("utf-8") for path in tmp_path.rglob("*_pb2*")}
    committed = {p.name: p.read_text("utf-8") for p in (PROTO / "quiver" / "v1").glob("*_pb2*")}

    assert fresh.keys() == committed.keys() and len(fresh) == 12
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert not changed, f"run `make proto`: {changed} are not what the .proto files say"
