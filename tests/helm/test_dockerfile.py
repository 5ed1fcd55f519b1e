"""The Dockerfile: what a linter says, and that it agrees with the house and with the chart."""

import re
import subprocess
from fnmatch import fnmatch

import pytest
import yaml
from helm import tools
from helm.chart import CHART, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILD, FINAL = DOCKERFILE.split("\nFROM ")[1:]


def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run([tools.hadolint(), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_the_final_stage_has_no_root_and_installs_nothing() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user, group = (values["podSecurityContext"][key] for key in ("runAsUser", "runAsGroup"))
    assert f"\nUSER {user}:{group}\n" in FINAL
    assert "RUN" not in FINAL
    assert 'ENTRYPOINT ["quiver"]' in FINAL


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
