"""A release's life with the real helm: installed, tested, upgraded, rolled back, uninstalled, on a stub of the API.

The stub (`cluster.py`) checks every write as an API server would; that pods really run is not shown here.
"""

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
from helm.chart import CHART, SETTINGS, helm, objects, rendered, run_helm
from helm.deploy.apistub import running_stub
from helm.deploy.cluster import KINDS, Cluster

pytestmark = pytest.mark.slow
Names = set[tuple[str, str]]


class Api:
    """The stub, and helm on it."""

    def __init__(self, cluster: Cluster, kubeconfig: Path, home: Path) -> None:
        self.cluster = cluster
        self._environment = {"KUBECONFIG": str(kubeconfig), "HOME": str(home)}

    def helm(self, *arguments: str | Path) -> str:
        """What helm prints; must succeed."""
        return helm(*arguments, "--namespace", "prod", **self._environment)

    def refused(self, *arguments: str | Path) -> str:
        """Helm's last words; must fail."""
        result = run_helm(*arguments, "--namespace", "prod", **self._environment)
        assert result.returncode, result.stdout
        return result.stderr

    def names(self) -> Names:
        """All objects that are there, but helm's own records and the namespace."""
        everything = (key for kind in KINDS for key in self.cluster.of_kind(kind))
        return {(key.kind.kind, key.name) for key in everything if key.kind.kind not in ("Secret", "Namespace")}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_stub("prod") as (cluster, kubeconfig):
        path = tmp_path / "kubeconfig"
        path.write_text(kubeconfig)
        path.chmod(0o600)
        yield Api(cluster, path, tmp_path)


def expected(settings: str) -> Names:
    """What the chart renders, without the test's pod."""
    return {(item["kind"], item["metadata"]["name"]) for item in objects(rendered(settings)) if item["kind"] != "Pod"}


@pytest.mark.parametrize("settings", ["defaults", "multi-replica", "everything"])
def test_install_test_uninstall(api: Api, settings: str) -> None:
    out = api.helm("install", "rel", CHART, "--wait", "--timeout", "60s", *SETTINGS[settings])
    assert "STATUS: deployed" in out
    assert api.names() == expected(settings)
    events = api.cluster.watch()
    assert "Phase:          Succeeded" in api.helm("test", "rel", "--timeout", "60s")
    created: list[str] = []
    while True:
        try:
            event = events.get_nowait()
        except queue.Empty:
            break
        created += [event.key.name] if event.type == "ADDED" and event.key.kind.kind == "Pod" else []
    assert created == ["rel-quiver-test"]
    api.helm("uninstall", "rel", "--wait", "--timeout", "60s")
    assert {kind for kind, _ in api.names()} <= {"PersistentVolumeClaim"}, "claims are kept, nothing else"
    assert ("PersistentVolumeClaim", "rel-quiver-adapters") in api.names()


def test_upgrade_and_rollback(api: Api) -> None:
    api.helm("install", "rel", CHART, "--wait", *SETTINGS["everything"])
    first = api.cluster.find("Deployment", "rel-quiver")["spec"]
    jobs = {name for kind, name in api.names() if kind == "Job"}
    changes = "server.maxRunning=99,training.jobs[1].recipe.max_steps=7,networkPolicy.enabled=false"
    api.helm("upgrade", "rel", CHART, "--wait", *SETTINGS["everything"], "--set", changes)
    second = api.cluster.find("Deployment", "rel-quiver")["spec"]
    assert "--max-running=99" in second["template"]["spec"]["containers"][0]["args"]
    assert not [name for kind, name in api.names() if kind == "NetworkPolicy"]
    new_jobs = {name for kind, name in api.names() if kind == "Job"}
    assert (len(jobs & new_jobs), len(jobs - new_jobs)) == (2, 1), "the changed recipe is another Job, the others stay"
    api.helm("rollback", "rel", "1", "--wait")
    assert api.cluster.find("Deployment", "rel-quiver")["spec"] == first
    assert api.names() == expected("everything")
    assert api.helm("history", "rel").count("\n") == 4  # a heading and three revisions


def test_an_upgrade_with_a_mistake_changes_nothing(api: Api) -> None:
    api.helm("install", "rel", CHART, "--wait")
    version = api.cluster.version
    assert "additional properties 'replicas' not allowed" in api.refused("upgrade", "rel", CHART, "--set", "replicas=2")
    assert "must hold ReadWriteMany" in api.refused("upgrade", "rel", CHART, "--set", "replicaCount=2")
    assert api.cluster.version == version
    api.helm("upgrade", "rel", CHART, "--wait", "--set", "server.maxRunning=3")


def test_what_the_api_refuses_is_not_deployed(api: Api) -> None:
    """The stub refuses as an API server does, so the tests above can fail."""
    api.helm("install", "rel", CHART, "--wait")
    error = api.refused("upgrade", "rel", CHART, "--set", "nameOverride=other,fullnameOverride=rel-quiver")
    assert "spec.selector: field is immutable" in error
    error = api.refused("upgrade", "rel", CHART, "--set-json", 'affinity={"nodeAffinty": {}}')
    assert "nodeAffinty" in error


def test_two_releases_live_side_by_side(api: Api) -> None:
    api.helm("install", "rel", CHART, "--wait", *SETTINGS["multi-replica"])
    api.helm("install", "second", CHART, "--wait", *SETTINGS["multi-replica"])
    for name in ("rel-quiver", "rel-quiver-router"):
        first = api.cluster.find("Deployment", name)["spec"]["selector"]["matchLabels"]
        other = api.cluster.find("Deployment", name.replace("rel", "second"))["spec"]["template"]["metadata"]["labels"]
        assert not first.items() <= other.items()
    api.helm("uninstall", "second", "--wait")
    assert expected("multi-replica") <= api.names()
