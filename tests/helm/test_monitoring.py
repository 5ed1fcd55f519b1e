"""Alerts, dashboard and scaling: the queries are PromQL, on metrics that the server exports; each alert can fire."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import tools
from helm.chart import Object, objects, rendered, the
from support.idle_server import IdleServer

SERVICE = {"namespace": "prod", "service": "rel-quiver-replicas"}
_NAME = re.compile(r"\bquiver_[a-z_]+")


def alerts() -> Object:
    return the(objects(rendered("multi-replica")), "PrometheusRule")["spec"]


def dashboard() -> dict[str, Any]:
    return json.loads(
        the(objects(rendered("multi-replica")), "ConfigMap", "rel-quiver-dashboard")["data"]["quiver.json"]
    )


def queries() -> list[str]:
    """Every query of the chart."""
    triggers = the(objects(rendered("multi-replica")), "ScaledObject")["spec"]["triggers"]
    return [
        *(rule["expr"] for group in alerts()["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]),
        *(trigger["metadata"]["query"] for trigger in triggers),
    ]


def exported() -> set[str]:
    """The names that a server's metrics page has."""
    names: set[str] = set()
    server = IdleServer(Path("nowhere"))
    for family in server.metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names.update(family.name + suffix for suffix in suffixes)
    server.store.close()
    return names


def test_queries_ask_for_what_the_server_exports() -> None:
    asked = {name for query in queries() for name in _NAME.findall(query)}
    assert len(asked) > 10
    assert asked - exported() == set()


def test_the_autoscaler_asks_for_what_the_server_exports() -> None:
    (metric,) = the(objects(rendered("everything")), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in exported()


def test_alerts_and_scaling_look_at_their_own_release_alone() -> None:
    mine = 'namespace="prod",service="rel-quiver-replicas"'
    own = [query for query in queries() if "$namespace" not in query]
    assert len(own) > 8
    for query in own:
        assert query.count(mine) == len(re.findall(r"\{", query)), query


def promtool(*arguments: str | Path, folder: Path) -> str:
    path = tools.promtool()
    if path is None:
        pytest.skip("needs promtool: `apt-get install prometheus`, or a network for apt-get to download it")
    result = subprocess.run([path, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_queries_are_promql(tmp_path: Path) -> None:
    """As recording rules, Grafana's variables filled in."""
    plain = [query.replace("$__rate_interval", "5m").replace("$namespace", "prod") for query in queries()]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(plain)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "rules.yaml", folder=tmp_path)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """One input series of a server's pod."""
    inside = ",".join(f'{key}="{value}"' for key, value in {**SERVICE, "pod": "p0", **labels}.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


UP = series("up", "1x40")
# {alert: (series that raise it, when)}; each also proves that the others stay silent.
RAISING: dict[str, tuple[list[dict[str, str]], str]] = {
    "QuiverNoReplica": ([series("up", "0x40")], "3m"),
    "QuiverQueueLong": (
        [UP, series("quiver_waiting_sequences", "40x40"), series("quiver_running_sequences", "16x40")],
        "6m",
    ),
    "QuiverFirstTokenSlow": (
        [
            UP,
            series("quiver_time_to_first_token_seconds_bucket", "0+0x40", le="2.5"),
            series("quiver_time_to_first_token_seconds_bucket", "0+60x40", le="10.0"),
            series("quiver_time_to_first_token_seconds_bucket", "0+60x40", le="+Inf"),
        ],
        "20m",
    ),
    "QuiverKeysAndValuesFull": ([UP, series("quiver_kv_usage_ratio", "0.99x40")], "11m"),
    "QuiverAdapterRefused": ([UP, series("quiver_adapter_loads_total", "0 0 1x38", result="failed")], "5m"),
    "QuiverAdaptersThrash": ([UP, series("quiver_adapter_evictions_total", "0+20x40")], "20m"),
    "QuiverRequestsFail": (
        [UP, series("quiver_requests_total", "0+60x40", adapter="a", code="RESOURCE_EXHAUSTED")],
        "12m",
    ),
}
CALM = [
    UP,
    series("quiver_waiting_sequences", "3x40"),
    series("quiver_running_sequences", "16x40"),
    series("quiver_time_to_first_token_seconds_bucket", "0+60x40", le="0.3"),
    series("quiver_time_to_first_token_seconds_bucket", "0+60x40", le="+Inf"),
    series("quiver_kv_usage_ratio", "0.5x40"),
    series("quiver_adapter_loads_total", "0+1x40", result="ok"),
    series("quiver_adapter_evictions_total", "0+2x40"),
    series("quiver_requests_total", "0+600x40", adapter="a", code="OK"),
    # Another release's trouble.
    {"series": 'quiver_kv_usage_ratio{namespace="prod",service="other",pod="x"}', "values": "1x40"},
]


def rule_test(input_series: list[dict[str, str]], when: str, firing: set[str]) -> dict[str, Any]:
    """promtool's form: which alerts fire then. Their labels and words are checked where they do."""
    return {
        "interval": "1m",
        "input_series": input_series,
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": when,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)],
            }
        ],
    }


def test_each_alert_fires_for_its_reason_and_none_on_a_calm_day(tmp_path: Path) -> None:
    assert set(RAISING) == {rule["alert"] for group in alerts()["groups"] for rule in group["rules"]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(alerts()))
    cases = [rule_test(inputs, when, {name}) for name, (inputs, when) in RAISING.items()]
    cases.append(rule_test(CALM, "35m", set()))
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    promtool("check", "rules", "rules.yaml", folder=tmp_path)
    promtool("test", "rules", "test.yaml", folder=tmp_path)


def test_an_alert_says_where_and_how_much(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(alerts()))
    inputs, when = RAISING["QuiverQueueLong"]
    expected = {
        "exp_labels": {"severity": "warning", "pod": "p0", **SERVICE},
        "exp_annotations": {"summary": "p0 has 40 sequences in its queue, more than twice what runs: add replicas"},
    }
    alert = {"eval_time": when, "alertname": "QuiverQueueLong", "exp_alerts": [expected]}
    case = {"interval": "1m", "input_series": inputs, "alert_rule_test": [alert]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [case]}))
    promtool("test", "rules", "test.yaml", folder=tmp_path)


def test_the_dashboard_is_whole() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels), "two panels in one place"
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\b", json.dumps(panels)))
    assert used == variables
