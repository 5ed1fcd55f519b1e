"""The house keeps its shape: packages, arrows, sizes, and what may be imported from where."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "proto": "quiver",
    "peft": "quiver_peft",
    "server": "quiver_server",
    "trainer": "quiver_trainer",
    "trainer/demo": "quiver_demo",
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


def sources() -> list[Path]:
    """Our own modules, without what protoc generated."""
    found = [path for room, package in PACKAGES.items() for path in sorted((ROOT / room / package).rglob("*.py"))]
    return [path for path in found if "_pb2" not in path.name]


def module_name(path: Path) -> str:
    room = max((room for room in PACKAGES if path.is_relative_to(ROOT / room)), key=len)
    parts = path.relative_to(ROOT / room).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command at the root that sees the four packages, and the root itself only where Python itself adds it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in PACKAGES),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", PACKAGES)
def test_a_room_holds_one_package_and_no_module_of_its_own(room: str) -> None:
    """A `peft/__init__.py` would shadow Hugging Face's `peft` for everything that runs at the root."""
    assert [path.name for path in (ROOT / room).glob("*.py")] == []
    packages = [path.parent.name for path in (ROOT / room).glob("*/__init__.py")]
    assert packages == [PACKAGES[room]]


def test_every_folder_of_modules_is_a_package() -> None:
    for path in sources():
        assert (path.parent / "__init__.py").is_file(), path


def test_hugging_face_peft_is_not_hidden() -> None:
    assert peft.__version__ == importlib.metadata.version("peft")
    assert not Path(peft.__file__).is_relative_to(ROOT / "peft")
    # With the root on the path, as `python -c` and notebooks have it.
    safe_path_off = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    code = "import peft, sys; print(peft.LoraConfig.__module__, '' in sys.path)"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=safe_path_off, capture_output=True, text=True
    )
    assert out.stdout.split() == ["peft.tuners.lora.config", "True"], out.stderr


# Imports every module in a process of its own: forked, after the third-party imports have been paid for once.
_IMPORT_EACH = """
import importlib, os, sys, traceback
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # it is told below
for name in [name for name in sys.modules if name.partition(".")[0].startswith("quiver")]:
    del sys.modules[name]
failed = 0
for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"cannot import {name} first:")
            traceback.print_exc(limit=-2, file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


def test_every_module_can_be_the_first_to_be_imported() -> None:
    """No import circle that only works when somebody else went first."""
    out = run(sys.executable, "-c", _IMPORT_EACH, *(module_name(path) for path in sources()))
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_client_needs_no_torch() -> None:
    names = [module_name(path) for path in sources() if path.is_relative_to(ROOT / "proto")]
    assert "quiver" in names
    # None in sys.modules makes every attempt to import it fail.
    code = "import sys\nfor name in ('torch', 'numpy', 'tokenizers', 'quiver_peft'):\n    sys.modules[name] = None\n"
    out = run(sys.executable, "-c", code + "".join(f"import {name}\n" for name in names))
    assert out.returncode == 0, out.stderr


def test_the_arrows_run_down_only() -> None:
    out = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Contracts: 0 kept" not in out.stdout


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_and_functions_stay_small() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}: {length} lines"
        for path in sources()
        if (length := len(path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    too_long += [
        f"{path.relative_to(ROOT)}: {name} has {length} lines"
        for path in sources()
        for name, length in functions(path)
        if length > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_every_module_says_its_one_purpose() -> None:
    assert [
        str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


def test_tests_have_no_packages() -> None:
    """Test folders are named like the rooms: an `__init__.py` would make them packages of that name."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
