"""The chart as the tests see it: rendered by the real helm, read as YAML."""

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm import tools

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "quiver"
PROFILES = {path.stem: path for path in sorted((CHART / "profiles").glob("*.yaml"))}
EVERYTHING = Path(__file__).with_name("everything.yaml")
GATEWAY = Path(__file__).with_name("gateway.yaml")
# What is rendered and checked: each profile, the defaults, all that can be switched on at once, and what excludes that.
SETTINGS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    **{name: ("--values", str(path)) for name, path in PROFILES.items()},
    "everything": ("--values", str(EVERYTHING)),
    "gateway": ("--values", str(GATEWAY)),
}
KUBERNETES = ("1.30", "1.34", "1.37")
CUSTOM_GROUPS = ("monitoring.coreos.com", "keda.sh", "inference.networking.k8s.io")
Object = dict[str, Any]


def run_helm(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Helm's answer, good or bad."""
    return subprocess.run(
        [tools.helm(), *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment or None
    )


def helm(*arguments: str | Path, **environment: str) -> str:
    """What helm prints; fails with its words when it fails."""
    result = run_helm(*arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@cache
def rendered(settings: str, kubernetes: str = "1.34") -> str:
    """The manifests of one entry of SETTINGS."""
    return render_text("--kube-version", f"{kubernetes}.0", *SETTINGS[settings])


def render_text(*arguments: str) -> str:
    """The manifests of a release `rel` in the namespace `prod`."""
    return helm("template", "rel", CHART, "--namespace", "prod", *arguments)


def objects(text: str) -> list[Object]:
    """The manifests' objects, in order."""
    return [item for item in yaml.safe_load_all(text) if item]


def of_kind(items: list[Object], kind: str, name: str | None = None) -> list[Object]:
    """The objects of a kind, and of a name if one is given."""
    return [item for item in items if item["kind"] == kind and name in (None, item["metadata"]["name"])]


def the(items: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of this kind (and name)."""
    (found,) = of_kind(items, kind, name)
    return found


def pods(items: list[Object]) -> dict[str, Object]:
    """{kind/name: a pod's metadata and spec}, wherever an object makes pods; a Job's with the label it gives them."""
    found: dict[str, Object] = {}
    for item in items:
        name = item["metadata"]["name"]
        if item["kind"] in ("Pod", "Deployment", "Job"):
            found[f"{item['kind']}/{name}"] = item if item["kind"] == "Pod" else item["spec"]["template"]
        if item["kind"] == "Job":
            item["spec"]["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"] = name
    return found


def containers(pod: Object) -> list[Object]:
    """All containers of a pod."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def server(items: list[Object]) -> Object:
    """The server's container."""
    (container,) = the(items, "Deployment", "rel-quiver")["spec"]["template"]["spec"]["containers"]
    return container
