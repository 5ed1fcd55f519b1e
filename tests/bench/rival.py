"""A rival in an environment of its own: made once by pip, run as a process, asked by lines of JSON."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu_load import measured_load, resident_bytes
from bench.records import Record, record_from_json
from bench.results import Run, run_of

_HERE = Path(__file__).parent
_TCMALLOC = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/aarch64-linux-gnu")
# What pip brings along, does not fit the torch that it brings along, and is not needed.
_UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec"), "openvino": ("torchvision",), "hf": ()}
RIVALS = tuple(_UNWANTED)
_STOP_SECONDS = 30.0


def make_environment(name: str, environments: Path) -> Path:
    """The rival's Python, with the packages of `peers/<name>.txt`; made when it is missing or the file has changed."""
    wanted = (_HERE / "peers" / f"{name}.txt").read_text()
    folder = environments / name
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"installing {', '.join(wanted.split())} into {folder}: minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--requirement", str(_HERE / "peers" / f"{name}.txt")], check=True)
        if _UNWANTED[name]:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *_UNWANTED[name]], check=True)
        ready.write_text(wanted)
    return python.absolute()


def export_openvino(python: Path, model: Path) -> None:
    """A model's base in OpenVINO's form, float32, where it is missing."""
    base, folder = model / "base", model / "openvino"
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    command = [str(python.parent / "optimum-cli"), "export", "openvino", "--model", str(base)]
    command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(unfinished)]
    subprocess.run(command, check=True, env=environment("openvino", python))
    unfinished.rename(folder)


def preloads(python: Path) -> list[str]:
    """Intel's OpenMP of the environment, and tcmalloc where the system has it: both make torch on a CPU faster."""
    found = [path for path in [python.parents[1] / "lib" / "libiomp5.so"] if path.is_file()]
    for folder in _TCMALLOC:
        found += sorted(Path(folder).glob("libtcmalloc.so.*"))[:1]
    return [str(path) for path in found]


def environment(name: str, python: Path) -> dict[str, str]:
    """The variables under which the rival runs best here."""
    cores = str(os.cpu_count())
    variables = {**os.environ, "PYTHONPATH": str(_HERE.parent), "OMP_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONSAFEPATH", None)
    if name != "openvino":  # it brings a thread pool of its own
        variables["LD_PRELOAD"] = ":".join(preloads(python))
    if name == "vllm":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",
        }
    return variables


@dataclass(frozen=True)
class Rival:
    """A rival whose model is ready. name: as `RIVALS`; versions: of its packages, and what was preloaded."""

    name: str
    process: "subprocess.Popen[str]"
    startup_seconds: float
    versions: Mapping[str, str]

    def run(self, requests_path: Path, concurrency: int) -> tuple[Run, list[Record]]:
        """One repeat."""
        with measured_load() as load:
            rows = _ask(self.process, {"requests": str(requests_path.absolute()), "concurrency": concurrency})
        records = [record_from_json(row) for row in rows]
        return run_of(records, load), records

    @property
    def rss_bytes(self) -> int:
        """Resident now."""
        return resident_bytes(self.process.pid)


@contextmanager
def running_rival(name: str, python: Path, settings: Mapping[str, Any], log: Path) -> Generator[Rival]:
    """The rival's process; it ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = environment(name, python)
    started = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(python), "-m", f"bench.peers.{name}_peer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables,
        )  # fmt: skip
    try:
        answer = _ask(process, settings)
        versions = {**answer["versions"], "LD_PRELOAD": variables.get("LD_PRELOAD", "")}
        yield Rival(name, process, time.perf_counter() - started, versions)
    except EOFError:
        raise RuntimeError(f"{name} ended; its log: {log}") from None
    finally:
        _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """It ends by itself when there is nothing more to read."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _ask(process: "subprocess.Popen[str]", line: Mapping[str, Any]) -> Any:
    """Raises EOFError when the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(line) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise EOFError from None
    answer = process.stdout.readline()
    if not answer:
        raise EOFError
    return json.loads(answer)
