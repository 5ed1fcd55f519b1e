"""The Dockerfile: what a linter says, and that it agrees with the house and with the chart."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from helm import tools
from helm.chart import CHART, ROOT

from quiver_peft.kernels.cpp.build import built_library

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILD, FINAL, CUDA, LAST = DOCKERFILE.split("\nFROM ")[1:]


def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run([tools.hadolint(), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_the_final_stage_has_no_root_and_installs_nothing() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user, group = (values["podSecurityContext"][key] for key in ("runAsUser", "runAsGroup"))
    assert f"\nUSER {user}:{group}\n" in FINAL
    assert "\nRUN" not in FINAL
    assert 'ENTRYPOINT ["quiver"]' in FINAL
    assert LAST == "run AS cpu\n", "what is built by default is that stage"
    assert CUDA.rstrip().splitlines()[-3] == f"USER {user}:{group}", "root no longer than it installs"


def test_the_kernels_are_compiled_where_the_server_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The build's own command, here: the server then needs no compiler."""
    (place,) = re.findall(r"^    XDG_CACHE_HOME=(\S+)$", FINAL, re.MULTILINE)
    assert f"XDG_CACHE_HOME={place} " in BUILD
    assert f"COPY --from=build {place} {place}\n" in FINAL
    (code,) = re.findall(r"/opt/venv/bin/python -c \\\n +'(.*)' \\\n", BUILD)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/compiler")
    assert built_library().parent == tmp_path / "quiver"
    assert len(list((tmp_path / "quiver").iterdir())) == 2


def test_image_and_chart_agree() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f"COPY trainer/demo/base {values['model']['path']}\n" in FINAL
    ports = re.findall(r"^EXPOSE (.*)$", FINAL, re.MULTILINE)[0].split()
    assert [int(port) for port in ports] == [values["ports"]["grpc"], values["ports"]["metrics"]]


def test_torch_is_the_makefiles() -> None:
    (makefile,) = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^ARG TORCH=(.*)$", DOCKERFILE, re.MULTILINE) == [makefile]


def test_the_version_is_the_projects() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version


def copied() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_exists_and_is_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(fnmatch(source, pattern) for pattern in admitted)


def test_nothing_else_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
