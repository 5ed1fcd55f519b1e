"""Secure by default: no root, nothing writable, no capabilities, no token, and a closed network."""

import pytest
from helm.chart import SETTINGS, Object, containers, objects, of_kind, pods, render_text, rendered, server, the


@pytest.mark.parametrize("settings", SETTINGS)
def test_pods_are_restricted(settings: str) -> None:
    """What the Pod Security Standard `restricted` asks for, and more."""
    found = pods(objects(rendered(settings)))
    assert found
    for where, pod in found.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["enableServiceLinks"] is False, where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] >= 10000, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        for volume in spec["volumes"]:
            assert "hostPath" not in volume, where
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["capabilities"] == {"drop": ["ALL"]}, where
            assert "memory" in container["resources"]["limits"], where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert not container["image"].endswith(":latest") and ":" in container["image"], where


def test_only_those_that_bring_adapters_can_write_them() -> None:
    for where, pod in pods(objects(rendered("everything"))).items():
        for container in containers(pod):
            for mount in container["volumeMounts"]:
                if mount["name"] in ("adapters", "model"):
                    writer = container["name"] in ("train", "adapter-sync", "model-download")
                    reads_model = container["name"] == "train" and mount["name"] == "model"
                    assert mount.get("readOnly", False) is (not writer or reads_model), where


def test_secrets_are_mounted_so_that_they_can_be_replaced() -> None:
    """Whole folders, which the kubelet keeps up to date, not files of them; for the pod's own group alone."""
    seen: set[str] = set()
    for where, pod in pods(objects(rendered("everything"))).items():
        secrets = {volume["name"]: volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume}
        seen |= {secret["secretName"] for secret in secrets.values()}
        assert all(secret["defaultMode"] == 0o440 for secret in secrets.values()), where
        for container in containers(pod):
            for mount in container["volumeMounts"]:
                if mount["name"] in secrets:
                    assert mount["readOnly"] is True, where
                    assert "subPath" not in mount, where
            for variable in container.get("env", []):
                secret = "valueFrom" in variable and variable["valueFrom"].get("secretKeyRef")
                assert not secret or pod["metadata"]["name"] == "rel-quiver-test", (
                    "a process's environment is read by many"
                )
    assert seen == {"servers", "front", "tokens"}


def test_the_servers_are_given_no_plain_token() -> None:
    volumes = the(objects(rendered("everything")), "Deployment", "rel-quiver")["spec"]["template"]["spec"]["volumes"]
    (tokens,) = (volume["secret"] for volume in volumes if volume["name"] == "tokens")
    assert tokens["items"] == [{"key": "tokens.toml", "path": "tokens.toml"}]


def test_helm_test_shows_a_token_or_asks_for_health_alone() -> None:
    def asked(*more: str) -> list[str]:
        pod = the(objects(render_text(*more)), "Pod")
        return [container["args"][0] for container in containers(pod)]

    assert asked() == ["health", "generate"]
    assert asked("--set", "tokens.existingSecret=t") == ["health"]
    assert asked("--set", "tokens.existingSecret=t,tokens.testKey=test") == ["health", "generate"]


def test_the_digest_wins_over_the_tag() -> None:
    assert server(objects(rendered("everything")))["image"].startswith("quiver@sha256:0123")


def test_a_gpu_is_asked_for_and_its_taint_tolerated() -> None:
    deployment = the(objects(rendered("one-gpu")), "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--device=cuda" in spec["containers"][0]["args"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert spec["runtimeClassName"] == "nvidia"
    # One that is there once is replaced in place.
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def policy(items: list[Object], component: str) -> Object:
    return the(items, "NetworkPolicy", f"rel-quiver-{component}")["spec"]


def sources(spec: Object, port: str) -> list[Object]:
    return [peer for rule in spec["ingress"] if {"port": port} in rule["ports"] for peer in rule["from"]]


OWN = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "quiver", "app.kubernetes.io/instance": "rel"}}}


def test_by_default_only_the_namespace_reaches_the_server_and_it_reaches_nobody() -> None:
    spec = policy(objects(rendered("defaults")), "server")
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert sources(spec, "grpc") == [OWN, {"podSelector": {}}]
    assert sources(spec, "metrics") == []
    assert spec["egress"] == []


def test_behind_a_router_the_servers_answer_only_their_own_release() -> None:
    items = objects(rendered("multi-replica"))
    assert sources(policy(items, "server"), "grpc") == [OWN]
    assert len(sources(policy(items, "server"), "metrics")) == 1
    router = policy(items, "router")
    assert sources(router, "grpc") == [OWN, {"podSelector": {}}]
    dns, servers = router["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert servers["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "server"


def test_behind_an_inference_gateway_its_pods_and_the_picker_reach_the_servers() -> None:
    for more, port in (("", "http"), ("inferencePool.protocol=grpc", "grpc"), ("router.enabled=true", "http")):
        spec = policy(objects(render_text(*SETTINGS["gateway"], "--set", more)), "server")
        gateways = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}
        assert sources(spec, port) == [OWN, gateways]
        assert sources(spec, "metrics") == [{"podSelector": {"matchLabels": {"app": "picker"}}}]


def test_what_fetches_may_go_out_as_far_as_it_is_told() -> None:
    spec = policy(objects(rendered("everything")), "server")
    dns, traces, fetched = spec["egress"]
    assert [{port["port"] for port in rule["ports"]} for rule in (dns, fetched)] == [{53}, {443}]
    assert traces == {"to": [{"podSelector": {"matchLabels": {"app": "collector"}}}]}
    training = policy(objects(rendered("everything")), "training")
    assert (training["ingress"], training["egress"]) == ([], [])


def test_servers_that_read_urls_may_go_out_too() -> None:
    def egress(*more: str) -> Object:
        return policy(
            objects(render_text("--set-json", 'networkPolicy.egress=[{"ports":[{"port":443}]}]', *more)), "server"
        )

    assert egress()["egress"] == []
    dns, told = egress("--set", "adapters.stores={s3://bucket}")["egress"]
    assert ({port["port"] for port in dns["ports"]}, told) == ({53}, {"ports": [{"port": 443}]})


def test_nodes_that_train_together_reach_each_other_and_dns() -> None:
    items = objects(rendered("everything"))
    (job,) = (item for item in of_kind(items, "Job") if "completions" in item["spec"])
    spec = the(items, "NetworkPolicy", job["metadata"]["name"])["spec"]
    own = {"podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job["metadata"]["name"]}}}
    assert spec["podSelector"] == own["podSelector"]
    assert spec["ingress"] == [{"from": [own]}]
    dns, others = spec["egress"]
    assert ({port["port"] for port in dns["ports"]}, others) == ({53}, {"to": [own]})


def test_a_policy_covers_each_workload() -> None:
    items = objects(rendered("everything"))
    covered = [item["spec"]["podSelector"]["matchLabels"] for item in of_kind(items, "NetworkPolicy")]
    several = {f"Job/{item['metadata']['name']}" for item in of_kind(items, "Job") if "completions" in item["spec"]}
    for where, pod in pods(items).items():
        matches = [labels for labels in covered if labels.items() <= pod["metadata"]["labels"].items()]
        assert len(matches) == (0 if where == "Pod/rel-quiver-test" else 1 + (where in several)), where


def test_claims_outlive_the_release() -> None:
    claims = of_kind(objects(rendered("everything")), "PersistentVolumeClaim")
    assert len(claims) == 2
    for claim in claims:
        assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_long_names_stay_valid() -> None:
    items = objects(render_text("--set", f"fullnameOverride={'a' * 40}", *SETTINGS["everything"]))
    assert max(len(item["metadata"]["name"]) for item in items) <= 63
