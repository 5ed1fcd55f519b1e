"""The Deployment in a real container: not root, nothing writable, adapters from the claim, a clean end."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.chart import ROOT
from helm.deploy.containers import CLAIM, Podman, rendered_for_podman, usable_podman
from helm.deploy.routed import free_ports, get
from support.tiny import hf_lora

from quiver import Client

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with usable_podman() as podman:
        yield podman


def container(podman: Podman) -> str:
    names = podman("ps", "--all", "--format", "{{.Names}}").split()
    (name,) = (name for name in names if name.endswith("-server"))
    return name


def inspect(podman: Podman, field: str) -> str:
    return podman("inspect", "--format", f"{{{{{field}}}}}", container(podman)).strip()


def test_the_deployment_serves_two_adapters_and_drains(podman: Podman, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"first": {"rank": 2}, "second": {"rank": 4}}
    for seed, (name, adapter) in enumerate(settings.items()):
        hf_lora(ROOT / "trainer/demo/base", tmp_path / name, targets=["q_proj", "v_proj"], seed=seed, **adapter)
    port, metrics_port = free_ports(2)
    (tmp_path / "release.yaml").write_text(yaml.safe_dump_all(rendered_for_podman(port, metrics_port)))
    podman("kube", "play", tmp_path / "release.yaml")
    claim = Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", CLAIM).strip())
    with Client(f"127.0.0.1:{port}", timeout_seconds=60) as client:
        client.wait_until_ready(60)
        for name in settings:
            shutil.copytree(tmp_path / name, claim / f".{name}")
            for file in (claim / f".{name}").iterdir():
                file.chmod(0o644)  # the server is another user
            (claim / f".{name}").rename(claim / name)
        answers = {name: client.generate("Ticket from", adapter=name, max_new_tokens=8) for name in ("", *settings)}
        for name in settings:
            served_by = answers[name].adapter
            assert served_by is not None
            assert served_by.id == name
        assert len({answer.token_ids for answer in answers.values()}) == 3, "three models, three answers"
        assert 'quiver_requests_total{adapter="second",code="OK"}' in get(f"http://127.0.0.1:{metrics_port}/metrics")[1]
        check_confinement(podman)
        check_drain(podman, client)


def check_confinement(podman: Podman) -> None:
    """What the security context promises, as the kernel sees it."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{inspect(podman, '.State.Pid')}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert set(status["Uid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for path, message in (("/here", "Read-only file system"), ("/adapters/here", "Read-only file system")):
        result = podman.run("exec", container(podman), "/usr/bin/touch", path)
        assert message in result.stderr, path
    podman("exec", container(podman), "/usr/bin/touch", "/tmp/here")


def check_drain(podman: Podman, client: Client) -> None:
    """A stream that runs when SIGTERM comes is finished, and the process ends with 0 by itself."""
    stream = client.stream("Ticket from", adapter="first", max_new_tokens=200, ignore_eos=True)
    tokens = len(next(stream).token_ids)
    name = container(podman)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(podman, "stop", "--time", "30", name)
        tokens += sum(len(piece.token_ids) for piece in stream)
        assert tokens == 200
        stopping.result()
    assert inspect(podman, ".State.ExitCode") == "0"  # 137: killed when the 30 s were over
    logs = podman.run("logs", name)
    assert "drained" in logs.stdout + logs.stderr
