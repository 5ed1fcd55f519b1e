"""values.yaml and its schema: complete, strict, and contradictions refused before anything is created."""

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest
import yaml
from helm.chart import CHART, PROFILES, run_helm

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return cast(dict[str, Any], SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]])
    return schema


def pairs(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each place in the schema that names its keys, with what values.yaml has there."""
    schema = resolve(schema)
    if "properties" in schema and isinstance(value, dict):
        yield path, schema, value
        for key, child in schema["properties"].items():
            yield from pairs(child, value.get(key), f"{path}.{key}".lstrip("."))


def test_every_value_has_a_default_and_every_default_is_known() -> None:
    seen = 0
    for path, schema, value in pairs(SCHEMA, DEFAULTS):
        names = set(schema["properties"]) - {"global"}  # `global` is helm's own
        assert names == set(value), path
        assert schema["additionalProperties"] is False, path
        seen += len(names)
    assert seen > 100


def test_every_value_is_explained() -> None:
    """A comment above each key that is not a mere section; `# --` above a key speaks for all below it."""
    explained_depth = 99  # of the nearest key above whose comment speaks for its children
    comment = ""
    for number, line in enumerate((CHART / "values.yaml").read_text().splitlines(), start=1):
        depth, text = len(line) - len(line.lstrip()), line.strip()
        if not text or text.startswith("#"):
            comment = text if not text or not comment else comment  # the first line of a block says what it is
            continue
        if depth <= explained_depth:
            explained_depth = depth if comment.startswith("# --") else 99
        assert comment or text.endswith(":") or depth > explained_depth, f"line {number}: {line}"
        comment = ""


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, child in cast(dict[str, Any], value).items():
            yield from leaves(child, (*path, key))
    else:
        yield path, value


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_holds_only_what_it_changes(profile: str) -> None:
    text = PROFILES[profile].read_text()
    assert f"-f helm/quiver/profiles/{profile}.yaml" in text, "a profile tells how it is installed"
    defaults = dict(leaves(DEFAULTS))
    repeated = [".".join(path) for path, value in leaves(yaml.safe_load(text)) if defaults.get(path) == value]
    assert repeated == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("replicas=3", "additional properties 'replicas' not allowed"),
        ("server.kvMemoryMib=1", "additional properties 'kvMemoryMib' not allowed"),
        ("server.dtype=float8", "/server/dtype"),
        ("server.maxRunning=0", "/server/maxRunning"),
        ("gpu.count=2", "/gpu/count"),
        ("gpu.count=one", "/gpu/count"),
        ("image.digest=sha256:12", "/image/digest"),
        ("image.repository=", "/image/repository"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("ports.grpc=70000", "/ports/grpc"),
        ("server.logFormat=xml", "/server/logFormat"),
        ("metrics.otlpEndpoint=collector:4317", "/metrics/otlpEndpoint"),
        ("model.path=relative/path", "/model/path"),
        ("adapters.volume.size=large", "/adapters/volume/size"),
        ("adapters.volume.accessModes={ReadWrite}", "/adapters/volume/accessModes"),
        ("resources.requests.cpu=null", "/resources/requests"),
        ("autoscaling.minReplicas=0", "/autoscaling/minReplicas"),
        ("router.hashBalancePercent=50", "/router/hashBalancePercent"),
        ("fullnameOverride=Not_A_Name", "/fullnameOverride"),
        ("topologySpread=Never", "/topologySpread"),
        ("tls.certKey=", "/tls/certKey"),
        ("tokens.key=a/b", "/tokens/key"),
        ("training.jobs[0].name=Bad_Name", "/training/jobs/0"),
        ("training.jobs[0].name=good", "/training/jobs/0"),  # no recipe
        ("training.jobs[0].nodes=0", "/training/jobs/0/nodes"),
    ],
)
def test_what_the_schema_refuses(change: str, words: str) -> None:
    result = run_helm("template", "rel", CHART, "--set", change)
    assert result.returncode
    assert words in result.stderr


JOB = 'training.jobs=[{"name":"a","recipe":{"adapter":{"method":"lora"},"data":{"train":"/data/t.jsonl"}}}]'

POOL = 'inferencePool={"enabled":true,"pickerName":"p"}'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["replicaCount=2"], "2 replicas share the adapters volume: adapters.volume.accessModes must hold"),
        (
            ['autoscaling={"enabled":true,"maxReplicas":5}'],
            "5 replicas share the adapters volume",
        ),
        (
            ["replicaCount=2", "adapters.volume.size=", 'adapters.state={"existingClaim":"s"}'],
            "2 replicas cannot share adapters.state.existingClaim",
        ),
        (['adapters.stores=["ftp://host/x"]'], "adapters/stores/0"),
        (["model.path=/models/base"], "model.path /models/base lies on a volume: set model.volume.existingClaim"),
        (["model.volume.existingClaim=m"], "a model from a volume or a download lies under /models/"),
        (['autoscaling={"enabled":true,"minReplicas":5,"maxReplicas":1}'], "minReplicas is greater than"),
        (["tls.clientCaKey=ca.crt"], "need the servers' TLS: set tls.existingSecret"),
        (["router.tlsSecret=front"], "need the servers' TLS: set tls.existingSecret"),
        (["inferencePool.enabled=true"], "inferencePool.pickerName: name the endpoint picker's Service"),
        ([POOL], "name it in networkPolicy.metrics"),
        ([POOL.replace("{", '{"protocol":"http",')], "forwards to ports.http, which is 0"),
        ([POOL, "networkPolicy.enabled=false", "tls.existingSecret=s"], "an InferencePool knows no TLS to its pods"),
        (["tokens.testKey=test"], "tokens.testKey is a key of tokens.existingSecret, which is not set"),
        (["metrics.otlpEndpoint=http://collector:4317"], "name the collector in networkPolicy.traces"),
        (["metrics.serviceMonitor.enabled=true"], "name Prometheus in networkPolicy.metrics"),
        ([JOB], "training.jobs need rows: set one of"),
        ([JOB, 'training.data={"existingClaim":"a","configMap":"b"}'], "training.jobs need rows: set one of"),
        ([JOB, "training.data.configMap=a", 'adapters.volume.size=""'], "adapters.volume needs a size or an"),
        (
            [JOB.replace('"name"', '"nodes":2,"name"'), "training.data.configMap=a"],
            "the 2 nodes of a share the adapters volume: adapters.volume.accessModes must hold ReadWriteMany",
        ),
        (
            [JOB, "training.data.configMap=a", "model.path=/models/base", "model.download.image=x"],
            "training.jobs need the base too",
        ),
    ],
)
def test_contradictions_are_refused(changes: list[str], words: str) -> None:
    arguments = [part for change in changes for part in ("--set-json", quoted(change))]
    result = run_helm("template", "rel", CHART, *arguments)
    assert result.returncode
    assert words in result.stderr


def quoted(change: str) -> str:
    """key=value with a bare word made JSON."""
    key, _, value = change.partition("=")
    try:
        json.loads(value)
    except json.JSONDecodeError:
        value = json.dumps(value)
    return f"{key}={value}"


def test_a_recipe_cannot_choose_base_or_output() -> None:
    """The chart does: an adapter lands in the served volume under its own name."""
    for key in ("base", "output"):
        job = JOB.replace('"recipe":{', f'"recipe":{{"{key}":"/elsewhere",')
        result = run_helm("template", "rel", CHART, "--set-json", job)
        assert result.returncode
        assert f"/training/jobs/0/recipe/{key}" in result.stderr
