"""Build of the C++ kernels: compiled once per instruction set and source version, kept in the user's cache folder."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_TIMEOUT_SECONDS = 300
_DIGEST_BYTES = 32


class BuildError(Exception):
    """The kernels cannot be built or loaded on this machine; the message says why."""


def built_library(*, avx512: bool = True) -> Path:
    """Path of the compiled library, from the cache or built now. Raises BuildError.

    avx512: use AVX-512 where the machine has it.
    """
    flags = instruction_set_flags()
    return _built((*_FLAGS, *(flags if avx512 else _AVX2)))


def built_for_every_machine() -> list[Path]:
    """Builds a library for each instruction set, for container images without a compiler. Raises BuildError."""
    return [_built((*_FLAGS, *flags)) for flags in (_AVX2, _AVX512)]


def _built(flags: tuple[str, ...]) -> Path:
    folder = cache_folder()
    path = folder / f"kernels-{_source_digest(flags)}.so"
    if _is_whole(path):
        return path
    compiler = find_compiler()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        # The cache folder is not writable: build for this process alone.
        path = Path(tempfile.mkdtemp(prefix="quiver-kernels-")) / path.name
        work = tempfile.TemporaryDirectory(dir=path.parent)
    with work as temporary:
        # An atomic rename: when two processes build at once, the last one wins and both have a whole library.
        _compile(compiler, flags, Path(temporary)).rename(path)
    return path


def cache_folder() -> Path:
    """The folder of compiled libraries: $XDG_CACHE_HOME/quiver or ~/.cache/quiver."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quiver"


def instruction_set_flags() -> tuple[str, ...]:
    """Compiler flags for this machine's best instruction set. Raises BuildError without AVX2 and FMA, or Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        raise BuildError("/proc/cpuinfo is not readable; the kernels are for Linux") from None
    found = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    for flags in (_AVX512, _AVX2):
        if {flag.removeprefix("-m") for flag in flags} <= found:
            return flags
    raise BuildError("this processor has no AVX2 with FMA")


def find_compiler() -> list[str]:
    """The C++ compiler: $CXX, g++, c++ or clang++. Raises BuildError."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def _source_digest(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (*_sources(), *sorted(_HERE.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], flags: tuple[str, ...], folder: Path) -> Path:
    """Compiles the sources in parallel, links them, and appends the library's SHA-256."""
    objects = [folder / f"{source.stem}.o" for source in _sources()]
    commands = [
        [*compiler, *flags, "-c", str(source), "-o", str(made)]
        for source, made in zip(_sources(), objects, strict=True)
    ]
    library = folder / "kernels.so"
    _run_all(commands)
    _run_all([[*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]])
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    return library


def _run_all(commands: list[list[str]]) -> None:
    """Runs the commands in parallel. Raises BuildError with the output of the first that fails."""
    try:
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            for command in commands
        ]
    except OSError as error:
        raise BuildError(f"cannot start the compiler: {error}") from None
    try:
        outputs = [process.communicate(timeout=_TIMEOUT_SECONDS)[0] for process in running]
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler did not finish within {_TIMEOUT_SECONDS} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    for process, command, output in zip(running, commands, outputs, strict=True):
        if process.returncode:
            said = output.decode(errors="replace").strip().splitlines()
            raise BuildError(f"{command[0]} ended with {process.returncode}: {' | '.join(said[:3])}")


def _is_whole(path: Path) -> bool:
    """Whether the file ends with its own digest: loading a damaged library could crash the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
