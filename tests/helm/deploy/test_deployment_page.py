"""The deployment page, word for word: its commands are run in order, its snippets of values are rendered.

helm is the real one, on the stub of the API. What needs a cluster or an image is played by small programs that know the
page's commands and no others: docker looks at the Dockerfile, and kubectl's port-forward starts a server with the
arguments that helm has just installed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helm import tools
from helm.chart import CHART, KUBERNETES, ROOT, objects, render_text
from helm.deploy.apistub import running_stub
from helm.deploy.cluster import Cluster
from helm.deploy.routed import free_ports
from support.tiny import hf_lora

from quiver import Client

PAGE = (CHART / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|((?:^    \S[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
PORT = "50051"


def blocks(text: str, language: str) -> list[str]:
    """Its code of one language, as it stands; indented code is sh."""
    return [
        code or re.sub("^    ", "", indented, flags=re.MULTILINE)
        for fenced, code, indented in BLOCK.findall(text)
        if (fenced or "sh") == language
    ]


@pytest.mark.parametrize("snippet", blocks(PAGE, "yaml"))
def test_every_snippet_of_values_is_taken(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(snippet)
    plain = objects(render_text())
    items = [item for item in objects(render_text("--values", str(tmp_path / "values.yaml"))) if item not in plain]
    assert items, "it changes nothing"
    for item in items:
        if item["apiVersion"].split("/")[0] not in ("cert-manager.io", "gateway.networking.k8s.io"):
            kubernetes_validate.validate(item, KUBERNETES[-1], strict=True)


def test_every_snippet_of_python_runs() -> None:
    snippets = blocks(PAGE, "python")
    for snippet in snippets:
        eval(snippet, {"Client": Client}).close()
    assert len(snippets) == 1


def test_every_value_that_is_named_is_there() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    dotted: list[str] = re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z]+)+)(?:=[^`]*)?`", PAGE)
    named = [name for name in dotted if name.split(".")[0] in values and not name.endswith((".toml", ".yaml"))]
    assert len(named) > 10
    for name in named:
        place = values
        for part in name.split("."):
            assert part in place, name
            place = place[part]


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"`((?:profiles/)?[a-z-]+\.yaml)`", PAGE):
        assert (CHART / name).exists() or name == "plugins.yaml", name


def test_the_readme_begins_with_the_pages_commands() -> None:
    section = (ROOT / "README.md").read_text().partition("## On Kubernetes")[2].partition("\n## ")[0]
    (first,) = blocks(section, "sh")
    mine, *_ = blocks(PAGE, "sh")
    assert re.sub(r" +# .*", "", first) == re.sub(r" +# .*", "", mine)


class Cell:
    """A shell in a copy of the repository's root, with the page's commands on its path."""

    def __init__(self, folder: Path, kubeconfig: str, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.adapters = folder / "claim"
        self.adapters.mkdir()
        (self.port,) = map(str, free_ports(1))
        self.forwarding: subprocess.Popen[bytes] | None = None
        for name in ("helm", "Dockerfile", "trainer"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "kubeconfig").write_text(kubeconfig)
        (folder / "kubeconfig").chmod(0o600)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "helm").symlink_to(tools.helm())
        self._program("quiver", f'exec {sys.executable} -m quiver.cli "$@"')
        self._program("docker", f'case "$1" in build) {tools.hadolint()} Dockerfile;; push) ;; *) exit 2;; esac')
        self.environment = {
            **os.environ,
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "KUBECONFIG": str(folder / "kubeconfig"),
            "HOME": str(folder),
        }

    def _program(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\nset -euo pipefail\n{script}\n")
        path.chmod(0o755)

    def run(self, line: str) -> str:
        """One line of the page; the port and the claim's folder are this machine's."""
        line = line.replace(PORT, self.port).replace("/adapters/", f"{self.adapters}/")
        if line.startswith("kubectl port-forward"):
            self.forward(line)
            return ""
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        return result.stdout

    def forward(self, line: str) -> None:
        """A server with what is installed, in place of a tunnel to one, and the moment that a person waits."""
        assert line == f"kubectl port-forward service/quiver {self.port} &"
        service, deployment = self.cluster.find("Service", "quiver"), self.cluster.find("Deployment", "quiver")
        assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        places = {
            "--base=": f"--base={ROOT}/trainer/demo/base", "--adapters=": f"--adapters={self.adapters}",
            "--state=": f"--state={self.folder}/state", "--host=": "--host=127.0.0.1",
            "--port=": f"--port={self.port}", "--metrics-port=": "--metrics-port=0",
        }  # fmt: skip
        arguments = [
            next((here for start, here in places.items() if word.startswith(start)), word) for word in container["args"]
        ]
        command = [str(self.folder / "bin" / "quiver"), *arguments]
        self.forwarding = subprocess.Popen(command, env=self.environment, cwd=self.folder, stderr=subprocess.DEVNULL)
        with Client(f"localhost:{self.port}") as client:
            client.wait_until_ready(60)


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    with running_stub("prod") as (cluster, kubeconfig):
        cell = Cell(tmp_path, kubeconfig, cluster)
        yield cell
        if cell.forwarding is not None:
            cell.forwarding.terminate()
            assert cell.forwarding.wait(30) == 0


@pytest.mark.slow
def test_a_new_user_follows_the_page(cell: Cell) -> None:
    hf_lora(ROOT / "trainer/demo/base", cell.folder / "my-adapter", rank=2, targets=["q_proj"])
    lines = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
    printed = {line.split(" #")[0].strip(): cell.run(line) for line in lines}
    assert len(printed) == len(lines) == 6
    said = {line.split()[0] + " " + line.split()[1]: text for line, text in printed.items()}
    assert "STATUS: deployed" in said["helm install"]
    assert "Succeeded" in said["helm test"]
    assert said["quiver generate"].strip()
    assert "my-adapter is resident: lora" in cell.run(f"quiver adapters load my-adapter --server localhost:{PORT}")
