"""Every profile, on every Kubernetes: helm and the schemas of Kubernetes and the operators agree."""

import kubernetes_validate
import pytest
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from helm.chart import (
    CHART,
    CUSTOM_GROUPS,
    KUBERNETES,
    SETTINGS,
    Object,
    helm,
    objects,
    of_kind,
    render_text,
    rendered,
    run_helm,
    the,
)
from helm.inference_pool import InferencePool

CUSTOM_KINDS = {
    "ScaledObject": ScaledObject,
    "ServiceMonitor": ServiceMonitor,
    "PrometheusRule": PrometheusRule,
    "InferencePool": InferencePool,
}
# Which of them each entry of SETTINGS has.
CUSTOM = {
    "multi-replica": {"ServiceMonitor", "PrometheusRule", "ScaledObject"},
    "everything": {"ServiceMonitor", "PrometheusRule"},
    "gateway": {"InferencePool"},
}


def is_custom(item: Object) -> bool:
    return item["apiVersion"].split("/")[0] in CUSTOM_GROUPS


@pytest.mark.parametrize("settings", SETTINGS)
def test_lint(settings: str) -> None:
    assert "[WARNING]" not in helm("lint", "--strict", CHART, *SETTINGS[settings])


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_objects_fit_kubernetes_own_schemas(settings: str, kubernetes: str) -> None:
    items = [item for item in objects(rendered(settings, kubernetes)) if not is_custom(item)]
    assert len(items) >= 6
    for item in items:
        kubernetes_validate.validate(item, kubernetes, strict=True)


def fits(item: Object) -> bool:
    """Whether a custom resource's schema takes it and knows every field: what it does not know it drops."""
    read = CUSTOM_KINDS[item["kind"]].model_validate(item)
    return read.model_dump(by_alias=True, exclude_unset=True, mode="json") == item


@pytest.mark.parametrize("settings", SETTINGS)
def test_custom_resources_fit_the_operators_schemas(settings: str) -> None:
    items = [item for item in objects(rendered(settings)) if is_custom(item)]
    assert {item["kind"] for item in items} == CUSTOM.get(settings, set())
    for item in items:
        assert fits(item), item["kind"]


def test_a_misspelt_field_of_a_custom_resource_is_seen() -> None:
    """The check above can fail."""
    scaled = the(objects(rendered("multi-replica")), "ScaledObject")
    assert fits(scaled)
    scaled["spec"]["maxReplicas"] = scaled["spec"].pop("maxReplicaCount")
    assert not fits(scaled)


def test_rendering_is_repeatable() -> None:
    again = render_text("--kube-version", "1.34.0", *SETTINGS["everything"])
    assert again == rendered("everything")


def test_an_older_kubernetes_is_refused() -> None:
    result = run_helm("template", "rel", CHART, "--kube-version", "1.29.9")
    assert result.returncode
    assert "chart requires kubeVersion: >=1.30.0-0" in result.stderr


def test_every_object_carries_the_common_labels() -> None:
    for item in objects(rendered("everything")):
        if item["metadata"]["name"] in ("rel-quiver-extra", "rel-text"):
            continue
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "quiver"
        assert labels["app.kubernetes.io/instance"] == "rel"
        assert labels["app.kubernetes.io/component"]


def test_extra_objects_are_templates() -> None:
    extra = the(objects(rendered("everything")), "ConfigMap", "rel-quiver-extra")
    assert extra["data"] == {"namespace": "prod"}
    assert of_kind(objects(rendered("everything")), "ConfigMap", "rel-text")


@pytest.mark.parametrize("settings", SETTINGS)
def test_notes_tell_what_to_do_next(settings: str) -> None:
    notes = helm("install", "rel", CHART, "--namespace", "prod", "--dry-run=client", *SETTINGS[settings])
    notes = notes.partition("NOTES:")[2]
    assert "rel-quiver.prod:50051" in notes
    assert "helm -n prod test rel" in notes
    assert "WARNING" not in notes


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ("networkPolicy.enabled=false", "whoever reaches the pods can generate, load and unload"),
        ("replicaCount=2,adapters.volume.accessModes={ReadWriteMany}", "stays with the one replica"),
        ("adapters.volume.size=", "adapters end with their pod"),
    ],
)
def test_notes_warn(change: str, warning: str) -> None:
    assert warning in helm("install", "rel", CHART, "--dry-run=client", "--set", change)
