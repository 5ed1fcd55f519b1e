"""Compiling and caching the kernels; without a compiler torch serves, and one line in the log says so."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from quiver_peft.kernels.cpp.build import BuildError, built_library, instruction_set_flags

ROOT = Path(__file__).parents[4]
# Computes with packed weights where there are kernels, and says which served.
_PROGRAM = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from quiver_peft.kernels.elementwise import rms_norm
from quiver_peft.kernels.cpp.library import library
torch.set_num_threads(1)
with torch.inference_mode():
    x = torch.ones(3, 40) * 2
    assert torch.allclose(rms_norm(x, torch.ones(40), 0.0), torch.ones(3, 40))
print("torch" if library() is None else "compiled")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def needs_avx2() -> None:
    try:
        instruction_set_flags()
    except BuildError as error:
        pytest.skip(f"needs an x86-64 processor with AVX2: {error}")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An empty cache, and a compiler that does not take its time: g++ without optimization, its calls counted."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    rooms = os.pathsep.join(str(ROOT / room) for room in ("proto", "peft"))
    others = {name: value for name, value in os.environ.items() if name != "QUIVER_KERNELS"}
    return {**others, "PYTHONPATH": rooms, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler)}


def start(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", _PROGRAM], env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What served, and the log."""
    out, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    return out.strip(), log


def run(environment: Mapping[str, str]) -> tuple[str, str]:
    return finish(start(environment))


def num_calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


def test_compiled_once_then_taken_from_the_cache_unless_it_is_damaged(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "CXX"):
        monkeypatch.setenv(name, environment[name])
    library = built_library()
    whole, calls = library.read_bytes(), num_calls(tmp_path)
    assert [library] == list((tmp_path / "cache" / "quiver").iterdir())
    assert built_library() == library
    assert num_calls(tmp_path) == calls
    for damaged in (whole[:20000], whole[:5000] + b"!" + whole[5001:]):
        library.write_bytes(damaged)
        assert built_library() == library
        assert library.read_bytes() == whole
    assert num_calls(tmp_path) == 3 * calls


def test_two_processes_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    both = [start(environment) for _ in range(2)]
    assert [finish(process) for process in both] == [("compiled", "")] * 2
    assert [path.suffix for path in (tmp_path / "cache" / "quiver").iterdir()] == [".so"]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be: compiled for this process alone."""
    (tmp_path / "cache").write_text("")
    for name in ("XDG_CACHE_HOME", "CXX"):
        monkeypatch.setenv(name, environment[name])
    library = built_library()
    assert library.is_file()
    shutil.rmtree(library.parent)


def test_no_compiler(environment: dict[str, str]) -> None:
    del environment["CXX"]
    served, log = run({**environment, "PATH": "/nonexistent"})
    assert served == "torch"
    assert log.startswith("WARNING compiled CPU kernels unavailable, using slower PyTorch operators: ")
    assert "no C++ compiler found" in log
    assert len(log.splitlines()) == 1


def test_a_broken_compiler(tmp_path: Path, environment: dict[str, str]) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho what is this machine >&2\nexit 3\n")
    broken.chmod(0o755)
    served, log = run({**environment, "CXX": str(broken)})
    assert served == "torch"
    assert f"{broken} ended with 3: what is this machine" in log
    assert len(log.splitlines()) == 1
    served, log = run({**environment, "CXX": str(tmp_path / "missing")})
    assert (served, len(log.splitlines())) == ("torch", 1)
    assert "cannot start the compiler" in log
    assert list((tmp_path / "cache" / "quiver").iterdir()) == [], "nothing half-made is left"


def test_switched_off(environment: dict[str, str]) -> None:
    assert run({**environment, "QUIVER_KERNELS": "torch"})[0] == "torch"
    assert run({**environment, "QUIVER_KERNELS": "avx2"})[0] == "compiled"
    wrong = start({**environment, "QUIVER_KERNELS": "fast"})
    assert "QUIVER_KERNELS=fast: must be auto, avx2 or torch" in wrong.communicate()[1]
    assert wrong.returncode != 0
