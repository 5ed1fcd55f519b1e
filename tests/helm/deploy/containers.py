"""The rendered Deployment in a real container, by `podman kube play`.

Images cannot be pulled everywhere, so the container's image is an empty one: this machine's /usr, Python and source are
mounted into it, read-only. That the Dockerfile's image holds the same is not shown here.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from helm.chart import ROOT, Object, objects, render_text, server

IMAGE = "localhost/quiver-stand-in"
CLAIM = "rel-quiver-adapters"
MODEL_PATH = "/opt/quiver/demo-base"


class Podman:
    """Podman with storage of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
        (folder / "storage.conf").write_text(storage)
        engine = '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        if shutil.which("runc"):  # crun refuses machines with both versions of cgroups
            engine += 'runtime = "runc"\n'
        (folder / "containers.conf").write_text(f"[containers]\ndefault_ulimits = []\n{engine}")
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
        }

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Podman's answer, good or bad."""
        command = ["podman", *map(str, arguments)]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=120, check=False)

    def __call__(self, *arguments: str | Path) -> str:
        """What podman prints; must succeed."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@contextmanager
def usable_podman() -> Generator[Podman]:
    """Podman with the stand-in image in its storage. Skips where containers cannot run."""
    if shutil.which("podman") is None:
        pytest.skip("needs podman: `apt-get install podman runc catatonit iptables`, as .ci/run does")
    # A short path: podman keeps sockets in it.
    with tempfile.TemporaryDirectory(prefix="quiver-") as text:
        podman = Podman(Path(text))
        _import_image(podman)
        trial = podman.run(
            "run", "--rm", "--publish", "1", "--volume", "/usr:/usr:ro", "--entrypoint", "/usr/bin/true", IMAGE
        )
        if trial.returncode:
            pytest.skip(f"needs a machine where podman can run a container; here: {trial.stderr.strip()[-300:]}")
        try:
            yield podman
        finally:
            podman.run("pod", "rm", "--all", "--force", "--time", "0")
            podman.run("volume", "rm", "--all", "--force")


def _import_image(podman: Podman) -> None:
    """Folders to mount on, and the entry point that the Dockerfile has."""
    path = podman.folder / "image.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("etc", "proc", "sys", "dev", "tmp", "usr"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        for name in ("bin", "lib", "lib64"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(entry)
    entry_point = f'ENTRYPOINT ["{sys.executable}", "-m", "quiver.cli"]'
    podman("import", "--change", entry_point, path, IMAGE)


def _mounted() -> list[Path]:
    """What Python needs of this machine: outermost folders only."""
    wanted = [Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), ROOT, *map(Path, sys.path)]
    found = sorted({path.resolve() for path in wanted if path.is_dir()})
    return [path for path in found if not any(path.is_relative_to(other) and path != other for other in found)]


def rendered_for_podman(grpc_port: int, metrics_port: int) -> list[Object]:
    """The chart's Deployment and its claim, with the image, the mounts and the Python path of the stand-in."""
    volumes = {f"host-{number}": str(path) for number, path in enumerate(_mounted())}
    values = {
        "image": {"repository": IMAGE, "tag": "latest", "pullPolicy": "Never"},
        "ports": {"grpc": grpc_port, "metrics": metrics_port},
        "drain": {"preStopSeconds": 1, "graceSeconds": 20},
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
        "extraEnv": [{"name": "PYTHONPATH", "value": ":".join(filter(None, sys.path))}],
        "extraVolumes": [
            *({"name": name, "hostPath": {"path": path}} for name, path in volumes.items()),
            {"name": "base", "hostPath": {"path": str(ROOT / "trainer/demo/base")}},
        ],
        "extraVolumeMounts": [
            *({"name": name, "mountPath": path, "readOnly": True} for name, path in volumes.items()),
            {"name": "base", "mountPath": MODEL_PATH, "readOnly": True},
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        items = objects(render_text("--values", file.name, "--no-hooks"))
    assert server(items)["args"][1] == f"--base={MODEL_PATH}"
    return [item for item in items if item["kind"] in ("Deployment", "PersistentVolumeClaim")]
