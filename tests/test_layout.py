"""The layout of the repository: one package per room, module sizes, and imports that work in any order.

`make lint` checks the rest: the arrows between packages (import-linter) and docstrings of modules (ruff).
"""

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections import Counter
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
MAX_FILE_LINES = 275
MAX_FUNCTION_LINES = 50  # without signature and docstring
MAX_MODULES = 16  # of one package, without its sub-packages
LARGER_PACKAGES = {"peft/quiver_peft/base": 20}


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


def test_every_module_can_be_the_first_to_be_imported() -> None:
    """No import circle that only works after another module was imported."""
    script = ROOT / "tests" / "support" / "import_each_first.py"
    out = run(sys.executable, str(script), *(module_name(path) for path in sources()))
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_client_needs_no_torch() -> None:
    names = [module_name(path) for path in sources() if path.is_relative_to(ROOT / "proto")]
    assert "quiver" in names
    # None in sys.modules makes every attempt to import it fail.
    code = "import sys\nfor name in ('torch', 'numpy', 'tokenizers', 'quiver_peft'):\n    sys.modules[name] = None\n"
    out = run(sys.executable, "-c", code + "".join(f"import {name}\n" for name in names))
    assert out.returncode == 0, out.stderr


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function's body."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            yield node.name, (node.end_lineno or node.lineno) - body[0].lineno + 1


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


def test_packages_stay_small() -> None:
    num_modules = Counter(str(path.parent.relative_to(ROOT)) for path in sources() if path.name != "__init__.py")
    too_large = {
        package: number for package, number in num_modules.items() if number > LARGER_PACKAGES.get(package, MAX_MODULES)
    }
    assert too_large == {}


def test_tests_have_no_packages() -> None:
    """Test folders are named like the rooms: an `__init__.py` would make them packages of that name."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
