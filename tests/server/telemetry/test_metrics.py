"""Metrics: true, of bounded number, well-named by promtool's rules, and such as routers read them."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from helm import tools
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.idle_server import MAX_ADAPTERS, IdleServer
from support.live_server import eventually
from support.server_fixture import ENDURING, ServerFixture

from quiver import Client, Tier
from quiver_server.adapters.entry import KnownAdapter
from quiver_server.telemetry.metrics import MAX_ADAPTER_LABELS, OTHER_ADAPTERS, STEP_PHASES, Metrics


def families(page: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page)}


def read_as_the_router_does(page: str) -> tuple[dict[str, float], set[str], set[str], int]:
    """The gauges; and of the adapters' family the newest series: running, waiting, how many fit.

    As the extractor of the Gateway API inference extension reads them: gauges or counters only, lists split at commas.
    """
    found = families(page)
    gauges: dict[str, float] = {}
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        family = found[f"vllm:{name}"]
        assert family.type == "gauge"
        (sample,) = family.samples
        gauges[name] = sample.value
    newest = max(found["vllm:lora_requests_info"].samples, key=lambda sample: sample.value)
    lists = [
        {name for name in newest.labels[f"{kind}_lora_adapters"].split(",") if name} for kind in ("running", "waiting")
    ]
    return gauges, lists[0], lists[1], int(newest.labels["max_lora"])


def test_promtool_has_nothing_to_say(llama: ServerFixture, client: Client) -> None:
    client.generate("hello", adapter="all-r2", max_new_tokens=2)
    promtool = tools.promtool()
    if promtool is None:
        pytest.skip("promtool is not installed, and apt-get could not download Debian's prometheus package")
    page = llama.server.metrics_page()
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    # The colon in the routers' names is vLLM's, and the only thing it minds.
    complaints = done.stderr.splitlines()
    assert {line.partition(" ")[2] for line in complaints} == {"metric names should not contain ':'"}, done.stderr
    assert {line.partition(":")[0] for line in complaints} == {"vllm"}


def test_a_router_sees_what_is_in_memory_and_what_runs(enduring: ServerFixture) -> None:
    server = enduring.server
    with server.client() as client:
        client.load_adapter("all-r2")
        stream = client.stream([5, 6, 7], **{**ENDURING, "adapter": "mlp-r8", "n": 3, "temperature": 1.0})
        next(stream)
        gauges, running, waiting, most = read_as_the_router_does(server.metrics_page())
        assert gauges["num_requests_running"] == 3
        assert gauges["num_requests_waiting"] == 0
        assert 0 < gauges["kv_cache_usage_perc"] < 1
        assert {"all-r2", "mlp-r8"} <= running
        assert waiting == set()
        assert most > len(running)
        stream.close()
        eventually(lambda: read_as_the_router_does(server.metrics_page())[0]["num_requests_running"] == 0)
        client.unload_adapter("mlp-r8")
    assert "mlp-r8" not in read_as_the_router_does(server.metrics_page())[1]


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[IdleServer]:
    server = IdleServer(tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    await server.store.names.entries()
    yield server
    server.store.close()


async def test_a_router_sees_who_waits(idle: IdleServer) -> None:
    def read() -> tuple[dict[str, float], set[str], set[str], int]:
        return read_as_the_router_does(generate_latest(idle.metrics.registry).decode())

    assert read() == ({"num_requests_waiting": 0, "num_requests_running": 0, "kv_cache_usage_perc": 0}, set(), set(), 8)
    entries: dict[str, KnownAdapter] = {entry.id: entry for entry in idle.store.names.known}
    entries["one"].waiting, entries["two"].waiting = {"": 2}, {"abcdef": 1}
    gauges, running, waiting, most = read()
    assert (gauges["num_requests_waiting"], running, waiting) == (3, set(), {"one", "two"})
    assert most == MAX_ADAPTERS, "nothing is known of their size yet"


def test_ids_that_come_and_go_do_not_become_labels_without_end() -> None:
    metrics = Metrics()
    labels = {metrics.adapter_label(f"adapter-{i}") for i in range(3 * MAX_ADAPTER_LABELS)}
    assert len(labels) == MAX_ADAPTER_LABELS + 1
    assert OTHER_ADAPTERS in labels
    assert metrics.adapter_label("adapter-0") == "adapter-0"
    assert metrics.adapter_label("") == "", "the base"


def test_the_phases_make_up_the_steps(llama: ServerFixture, client: Client) -> None:
    client.generate([5] * 60, max_new_tokens=5, ignore_eos=True)
    eventually(lambda: llama.server.metric("quiver_running_sequences") == 0)
    parts = [llama.server.metric("quiver_step_phase_seconds_total", phase=phase) for phase in STEP_PHASES]
    assert all(parts)
    assert sum(parts) == pytest.approx(llama.server.metric("quiver_step_seconds_sum"), rel=1e-6)


def test_what_a_failed_step_took_is_its_last_phase() -> None:
    metrics = Metrics()
    metrics.observe_step([1.0, 1.5, 4.0])
    page = families(generate_latest(metrics.registry).decode())
    seconds = {sample.labels.get("phase"): sample.value for sample in page["quiver_step_phase_seconds"].samples}
    assert [seconds[phase] for phase in STEP_PHASES] == [0.5, 2.5, 0.0, 0.0]


def test_times_are_of_one_candidate_each(llama: ServerFixture, client: Client) -> None:
    """Else candidates that get their tokens in one step would make the server look faster than it is."""
    names = (
        "quiver_inter_token_seconds_count",
        "quiver_time_to_first_token_seconds_count",
        "quiver_queue_seconds_count",
    )

    def counts() -> list[float]:
        return [llama.server.metric(name) for name in names]

    before = counts()
    answer = client.generate([5, 6], max_new_tokens=6, ignore_eos=True, n=4, temperature=1.0)
    assert answer.usage.generated_tokens == 24
    assert [after - was for was, after in zip(before, counts(), strict=True)] == [4 * 5, 1, 1]


def test_adapters_by_tier(llama: ServerFixture, client: Client) -> None:
    client.unload_adapter("pattern-r3")
    free = llama.server.metric("quiver_adapter_free_bytes")
    device = llama.server.metric("quiver_adapter_bytes", tier="device")
    loaded = client.load_adapter("pattern-r3")
    assert llama.server.metric("quiver_adapter_bytes", tier="device") - device == loaded.device_bytes
    assert free - llama.server.metric("quiver_adapter_free_bytes") == loaded.device_bytes
    assert llama.server.metric("quiver_adapter_bytes", tier="host") >= loaded.host_bytes > 0
    hits = llama.server.metric("quiver_adapter_host_hits_total")
    client.unload_adapter("pattern-r3")
    client.load_adapter("pattern-r3", tier=Tier.HOST)
    client.load_adapter("pattern-r3")
    assert llama.server.metric("quiver_adapter_host_hits_total") == hits + 1
    assert llama.server.metric("quiver_known_adapters") >= 6


def test_calls_are_counted_by_method_and_end(llama: ServerFixture, client: Client) -> None:
    def calls(method: str, code: str) -> float:
        try:
            return llama.server.metric("quiver_calls_total", method=method, code=code)
        except AssertionError:
            return 0.0

    before = calls("ListAdapters", "OK"), calls("GET /v1/models/{model}", "NOT_FOUND")
    client.list_adapters()
    httpx2.get(f"{llama.server.http_url}/v1/models/made-up-name")
    httpx2.get(f"{llama.server.http_url}/made-up-path")
    assert (calls("ListAdapters", "OK"), calls("GET /v1/models/{model}", "NOT_FOUND")) == (before[0] + 1, before[1] + 1)
    assert "made-up" not in llama.server.metrics_page()
    assert calls("unknown", "INVALID_ARGUMENT") >= 1


def test_the_http_front_has_the_same_page(llama: ServerFixture) -> None:
    """Routers scrape the port that they send requests to."""
    page = httpx2.get(f"{llama.server.http_url}/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    assert set(families(page.text)) == set(families(llama.server.metrics_page()))
