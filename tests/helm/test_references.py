"""What no schema sees: that the objects name each other, their ports, volumes and labels rightly."""

import re

import pytest
import yaml
from helm.chart import SETTINGS, Object, containers, objects, of_kind, pods, render_text, rendered, server, the

pytestmark = pytest.mark.parametrize("settings", SETTINGS)


@pytest.fixture
def items(settings: str) -> list[Object]:
    return objects(rendered(settings))


def selected(selector: Object, items: list[Object]) -> list[str]:
    """The pods that these labels choose."""
    return [where for where, pod in pods(items).items() if selector.items() <= pod["metadata"]["labels"].items()]


def ports(pod: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for item in containers(pod) for port in item.get("ports", [])}


def test_no_two_objects_share_kind_and_name(items: list[Object]) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in items]
    assert len(set(names)) == len(names)


def test_a_workload_selects_its_own_pods_alone(items: list[Object]) -> None:
    for deployment in of_kind(items, "Deployment"):
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert selected(selector, items) == [f"Deployment/{deployment['metadata']['name']}"]


def test_services_reach_pods_that_have_their_ports(items: list[Object]) -> None:
    routed = bool(of_kind(items, "Deployment", "rel-quiver-router"))
    expected = {"rel-quiver": "rel-quiver-router" if routed else "rel-quiver", "rel-quiver-replicas": "rel-quiver"}
    if "http" in ports(pods(items)["Deployment/rel-quiver"]):
        expected["rel-quiver-http"] = "rel-quiver"
    services = {service["metadata"]["name"]: service for service in of_kind(items, "Service")}
    jobs = {item["metadata"]["name"] for item in of_kind(items, "Job") if item["spec"].get("completions", 1) > 1}
    assert set(services) == set(expected) | jobs
    for service in (services[name] for name in expected):
        chosen = selected(service["spec"]["selector"], items)
        assert chosen == [f"Deployment/{expected[service['metadata']['name']]}"]
        for port in service["spec"]["ports"]:
            assert ports(pods(items)[chosen[0]])[port["targetPort"]] == port["port"]


def test_probes_ask_ports_that_are_there(items: list[Object]) -> None:
    probed = 0
    for pod in pods(items).values():
        for container in containers(pod):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe := container.get(kind):
                    port = (probe.get("grpc") or probe["httpGet"])["port"]
                    secured = any("tls-cert" in word for word in container.get("args", []))
                    assert not (secured and "grpc" in probe), "the kubelet's gRPC probes speak no TLS"
                    assert port in ports(pod) or port in ports(pod).values()
                    probed += 1
    assert probed >= 3


def test_mounts_have_volumes_and_volumes_are_mounted(items: list[Object]) -> None:
    for where, pod in pods(items).items():
        mounts = [mount for container in containers(pod) for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["spec"]["volumes"]}, where
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths)
            assert "/tmp" in paths or container["name"] == "envoy", f"{where}: nowhere to write"


def test_config_maps_and_claims_are_the_charts_or_the_users(items: list[Object]) -> None:
    made = {(item["kind"], item["metadata"]["name"]) for item in items}
    for pod in pods(items).values():
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in made or claim in ("models", "rows")


def test_the_grace_period_covers_the_drain(items: list[Object]) -> None:
    for pod in (item["spec"]["template"] for item in of_kind(items, "Deployment")):
        (container,) = pod["spec"]["containers"]
        pause = container["lifecycle"]["preStop"]
        if "sleep" in pause:
            (grace,) = (arg.partition("=")[2] for arg in container["args"] if arg.startswith("--grace-seconds"))
            needed = pause["sleep"]["seconds"] + int(grace)
        else:
            needed = int(re.findall(r"sleep (\d+)", pause["exec"]["command"][-1])[0])
        assert needed < pod["spec"]["terminationGracePeriodSeconds"]


def test_scaling_targets_the_servers_and_owns_their_number(items: list[Object]) -> None:
    scalers = of_kind(items, "HorizontalPodAutoscaler") + of_kind(items, "ScaledObject")
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == "rel-quiver"
    assert ("replicas" in the(items, "Deployment", "rel-quiver")["spec"]) is not bool(scalers)


def test_disruption_budgets_guard_what_has_replicas(items: list[Object], settings: str) -> None:
    for budget in of_kind(items, "PodDisruptionBudget"):
        assert len(selected(budget["spec"]["selector"]["matchLabels"], items)) == 1
    several = len(of_kind(items, "Deployment")) if settings in ("multi-replica", "everything", "gateway") else 0
    assert len(of_kind(items, "PodDisruptionBudget")) == several


def test_prometheus_reads_each_server_once(items: list[Object]) -> None:
    for monitor in of_kind(items, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        chosen = [
            service["metadata"]["name"]
            for service in of_kind(items, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            and endpoint["port"] in (port["name"] for port in service["spec"]["ports"])
        ]
        assert chosen == ["rel-quiver-replicas"]


def test_the_router_looks_up_the_headless_service(items: list[Object]) -> None:
    if not of_kind(items, "Deployment", "rel-quiver-router"):
        return
    envoy = yaml.safe_load(the(items, "ConfigMap", "rel-quiver-router")["data"]["envoy.yaml"])
    cluster = next(cluster for cluster in envoy["static_resources"]["clusters"] if cluster["name"] == "replicas")
    (group,) = cluster["load_assignment"]["endpoints"]
    (endpoint,) = group["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert address == {
        "address": "rel-quiver-replicas.prod",
        "port_value": ports(pods(items)["Deployment/rel-quiver"])["grpc"],
    }
    assert the(items, "Service", "rel-quiver-replicas")["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize(
    ("protocol", "app", "parser"), [("grpc", "kubernetes.io/h2c", "passthrough"), ("http", "http", "openai")]
)
def test_an_inference_pool_and_its_picker_speak_to_a_port_of_the_servers(
    settings: str, protocol: str, app: str, parser: str
) -> None:
    if settings != "gateway":
        return
    items = objects(render_text(*SETTINGS[settings], "--set", f"inferencePool.protocol={protocol}"))
    pool = the(items, "InferencePool")["spec"]
    assert selected(pool["selector"]["matchLabels"], items) == ["Deployment/rel-quiver"]
    assert pool["targetPorts"] == [{"number": ports(pods(items)["Deployment/rel-quiver"])[protocol]}]
    assert pool["appProtocol"] == app
    picker = yaml.safe_load(the(items, "ConfigMap", "rel-quiver-picker")["data"]["plugins.yaml"])
    assert picker["parser"] == {"pluginRef": f"{parser}-parser"}
    (profile,) = picker["schedulingProfiles"]
    used = [plugin["pluginRef"] for plugin in profile["plugins"]] + [picker["parser"]["pluginRef"]]
    assert sorted(used) == sorted(plugin["type"] for plugin in picker["plugins"])


def test_the_pods_of_a_job_with_several_nodes_find_each_other(items: list[Object]) -> None:
    """At pod 0, by the name that Kubernetes gives a pod with a subdomain: NAME-INDEX.SERVICE."""
    for job in of_kind(items, "Job"):
        spec, name = job["spec"], job["metadata"]["name"]
        nodes = spec.get("completions", 1)
        assert ("subdomain" in spec["template"]["spec"]) is (nodes > 1)
        if nodes == 1:
            continue
        assert (spec["completionMode"], spec["parallelism"]) == ("Indexed", nodes)
        service = the(items, "Service", spec["template"]["spec"]["subdomain"])
        assert selected(service["spec"]["selector"], items) == [f"Job/{name}"]
        assert service["spec"]["publishNotReadyAddresses"] is True
        (container,) = spec["template"]["spec"]["containers"]
        assert f"--nnodes={nodes}" in container["command"]
        assert f"--master-addr={name}-0.{service['metadata']['name']}" in container["command"]
        assert f"--master-port={service['spec']['ports'][0]['port']}" in container["command"]
        assert len(f"{name}-{nodes - 1}") <= 63


def test_threads_are_the_cpus_asked_for(items: list[Object]) -> None:
    container = server(items)
    assert "cpu" in container["resources"]["requests"]
    threads = next(variable for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS")
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "requests.cpu"


def test_a_router_with_another_configuration_is_another_pod(settings: str) -> None:
    """The checksum in its annotations rolls it."""

    def annotations(*more: str) -> Object:
        items = objects(render_text(*SETTINGS[settings], "--set", "router.enabled=true", *more))
        return the(items, "Deployment", "rel-quiver-router")["spec"]["template"]["metadata"]["annotations"]

    if settings == "everything":
        assert annotations() == annotations()
        assert annotations() != annotations("--set", "router.retries=1")
