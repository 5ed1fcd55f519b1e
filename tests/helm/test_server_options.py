"""The chart tells `quiver serve` only what its command line understands, and each value arrives."""

import pytest
from helm.chart import SETTINGS, objects, render_text, rendered, server

from quiver_server import cli
from quiver_server.config import ServerConfig


def parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """What the server's own command line makes of the rendered arguments."""
    seen: list[ServerConfig] = []

    def serve(config: ServerConfig) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("quiver_server.server.serve", serve)
    assert cli.run(server(objects(text))["args"][1:]) == 0
    return seen[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_server_takes_the_rendered_arguments(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(rendered(settings), monkeypatch)
    assert config.adapters == ["/adapters", *(["s3://bucket/adapters"] if settings == "everything" else [])]
    assert (str(config.state), config.cache_mib) == ("/state", 4096)
    assert config.host == "0.0.0.0"
    assert config.http_port == (8000 if settings in ("everything", "gateway") else -1)
    assert config.prefix_cache is (settings != "everything")  # one of its extraArgs


def test_each_value_reaches_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "ports.grpc": 1111, "ports.metrics": 2222, "ports.http": 3333, "server.kvMemoryMiB": 11,
        "server.adapterMemoryMiB": 12, "server.maxRunning": 13, "server.maxWaiting": 14, "server.maxStepTokens": 15,
        "server.defaultMaxNewTokens": 16, "drain.graceSeconds": 17, "server.logFormat": "json",
        "metrics.otlpEndpoint": "http://collector:4317", "networkPolicy.enabled": "false",
    }  # fmt: skip
    changes = ",".join(f"{key}={value}" for key, value in values.items())
    config = parsed(render_text("--set", changes, "--set", "server.dtype=bfloat16,model.path=/opt/x"), monkeypatch)
    assert (config.port, config.metrics_port, config.kv_memory_mib, config.adapter_memory_mib) == (1111, 2222, 11, 12)
    assert (config.max_running, config.max_waiting, config.max_step_tokens) == (13, 14, 15)
    assert (config.default_max_new_tokens, config.grace_seconds, config.http_port) == (16, 17.0, 3333)
    assert (config.log_format, config.otlp_endpoint) == ("json", "http://collector:4317")
    assert (config.dtype, str(config.base), config.device) == ("bfloat16", "/opt/x", "cpu")


def test_stores_have_credentials_a_way_out_and_a_place_for_state() -> None:
    changes = "adapters.stores={s3://bucket/a,https://host/b},adapters.storesEnvFrom[0].secretRef.name=bucket"
    state = "adapters.state.existingClaim=kept,adapters.state.cacheMiB=7"
    found = objects(render_text("--set", changes, "--set", state))
    container = server(found)
    assert [item for item in container["args"] if "adapters=" in item or "cache" in item] == [
        "--adapters=/adapters",
        "--adapters=s3://bucket/a",
        "--adapters=https://host/b",
        "--cache-mib=7",
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    (deployment,) = (item for item in found if item["kind"] == "Deployment")
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["state"]["persistentVolumeClaim"] == {"claimName": "kept"}
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    policies = [item["spec"] for item in found if item["kind"] == "NetworkPolicy"]
    assert any("server" in str(policy["podSelector"]) and policy["egress"] for policy in policies)
