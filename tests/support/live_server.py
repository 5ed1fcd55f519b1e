"""A real server process for tests: `quiver serve` on ports of the system's choice, its log in a file."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from quiver import Client, FinishReason, Generation, Tls

STARTUP_SECONDS = 60.0
SERVE = ("-m", "quiver.cli", "serve")
_SERVING = re.compile(r"serving .* on ([^ ]+:\d+) \(")
_METRICS = re.compile(r"metrics on (http://[^\s\"]+)")
_HTTP = re.compile(r"OpenAI's API on (https?://[^\s\"]+)/v1")


class LiveServer:
    """One server process. `log`: the file that takes what it prints; num_threads, launcher: as of `spawn`."""

    def __init__(
        self,
        base: Path,
        adapters: Path | str,
        log: Path,
        *options: str,
        num_threads: int | None = 1,
        launcher: Sequence[str] = SERVE,
    ) -> None:
        self.log = log
        folders = ("--base", str(base), "--adapters", str(adapters))
        self.process = spawn(log, *folders, *options, num_threads=num_threads, launcher=launcher)
        self.target = self._wait_for(_SERVING)
        self.metrics_url = self._wait_for(_METRICS)

    def client(self, token: str = "", tls: Tls | None = None) -> Client:
        """A connection of its own; a call that hangs fails the test."""
        return Client(self.target, timeout_seconds=60, token=token, tls=tls)

    @property
    def http_url(self) -> str:
        """Of the HTTP front, without a path; the server needs --http-port."""
        return self._wait_for(_HTTP)

    def openai(self, token: str = "anything", **options: Any) -> OpenAI:
        """OpenAI's own client of it, which tries nothing twice."""
        return OpenAI(base_url=f"{self.http_url}/v1", api_key=token, max_retries=0, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of the metrics page."""
        for family in text_string_to_metric_families(self.metrics_page()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no sample {name} {labels}")

    def metrics_page(self) -> str:
        """The metrics as Prometheus gets them."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            return answer.read().decode()

    def page_status(self, path: str) -> int:
        """The status of another page beside the metrics."""
        try:
            with urllib.request.urlopen(self.metrics_url.removesuffix("/metrics") + path, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Ask the process to end."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, unless it has ended already; returns the exit code."""
        self.signal()
        return self.wait()

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code, once the process has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not end within {seconds:g} s:\n{self.log.read_text()}") from None

    def _wait_for(self, pattern: re.Pattern[str]) -> str:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if found := pattern.search(self.log.read_text()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")


def spawn(
    log: Path, *options: str, num_threads: int | None = 1, launcher: Sequence[str] = SERVE
) -> subprocess.Popen[bytes]:
    """Start `quiver serve` with these options, which win over the tests' own; returns at once.

    num_threads: of torch, one so that tests do not stand in each other's way; None: the server's own choice.
    launcher: what Python runs, a module of the tests or of ours.
    """
    command = [sys.executable, *launcher, "--port", "0", "--metrics-port", "0", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if launcher is not SERVE:
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    environment.pop("OMP_NUM_THREADS", None)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def run_refused(log: Path, *options: str) -> tuple[int, str]:
    """Run a server that cannot start; returns its exit code and its last words."""
    process = spawn(log, *options)
    try:
        code = process.wait(STARTUP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"the server started:\n{log.read_text()}") from None
    return code, log.read_text()


def answer_tokens(answer: Generation) -> list[int]:
    """The tokens of the first candidate without the end-of-sequence token, as `hf_greedy` gives them."""
    tokens = list(answer.token_ids)
    return tokens[:-1] if answer.finish_reason is FinishReason.EOS else tokens


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Fail unless `holds` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.01)
