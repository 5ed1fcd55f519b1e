"""What a measurement leaves behind, and what counts."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench.cpu_load import UNCLEAN_CORES, Load
from bench.measuring import paired
from bench.records import Record
from bench.report import footnote, grids, save, step_split
from bench.results import CellResult, Report, Run, run_of
from bench.roofline import Machine


def run(tokens_per_second: float, others: float = 0.0, *, start: float = 0.0) -> Run:
    """One request of ten tokens, the first after a step."""
    step = 1 / tokens_per_second
    times = tuple(start + step * (i + 1) for i in range(10))
    return run_of([Record(0, 20, start, times, tuple(range(10)))], Load(1.5, others), num_steps=10, in_steps=9 * step)


def result(*runs: Run, engine: str = "quiver", cell: str = "k8-c8") -> CellResult:
    return CellResult(cell, engine, list(runs), rss_bytes=2**30, startup_seconds=3.0, roofline=200.0)


def report() -> Report:
    ours, theirs = [run(100), run(120), run(140)], [run(50), run(40), run(40)]
    cells = [result(*ours), result(*theirs, engine="vllm")]
    ratios = [paired("quiver: k8-c8", "vllm", ours, theirs, 3.0)]
    return Report("make bench", Machine(30e9, 160e9), cells=cells, ratios=ratios)


def test_a_run() -> None:
    one = run(100, start=5.0)
    assert one.throughput.output_tokens_per_second == pytest.approx(100)
    assert one.throughput.total_tokens_per_second == pytest.approx(300)
    assert one.time_to_first_token.p50 == pytest.approx(0.01)
    assert one.step_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(("others", "clean"), [(0.0, True), (UNCLEAN_CORES, True), (0.16, False)])
def test_clean_means_that_others_were_quiet(others: float, clean: bool) -> None:
    assert run(100, others).clean is clean


def test_runs_on_a_busy_machine_do_not_count_while_there_are_others() -> None:
    mixed = result(run(100), run(10, others=1.0), run(120))
    assert mixed.output_tokens_per_second == pytest.approx(110)
    assert mixed.num_clean == 2
    busy = result(run(10, others=1.0), run(30, others=1.0))
    assert busy.output_tokens_per_second == pytest.approx(20)
    assert busy.num_clean == 0
    assert mixed.roofline_fraction == pytest.approx(0.55)


def test_latencies_are_those_of_all_requests_that_count() -> None:
    found = result(run(100), run(50), run(1, others=1.0)).time_to_first_token
    assert (found.p50, found.p99) == pytest.approx((0.015, 0.0199))


def test_ratios_are_of_pairs() -> None:
    ratio = paired("ours", "theirs", [run(100), run(120), run(90)], [run(50), run(40), run(30)], 2.5)
    assert ratio.pairs == pytest.approx([2, 3, 3])
    assert ratio.median == pytest.approx(3)
    assert ratio.reached and ratio.num_clean == 3
    busy = paired("ours", "theirs", [run(100), run(10, 1.0)], [run(50), run(50)], 2.5)
    assert busy.pairs == pytest.approx([2]) and busy.num_clean == 1 and not busy.reached
    theirs = paired("ours", "theirs", [run(100)], [run(50, 1.0)], None)
    assert theirs.pairs == pytest.approx([2]) and theirs.num_clean == 0 and theirs.reached is None
    with pytest.raises(ValueError, match="shorter"):
        paired("ours", "theirs", [run(100)], [], None)


def test_the_file_says_where_and_when_and_with_what(tmp_path: Path) -> None:
    path = save(report(), "peers", tmp_path)
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["schema"] == 1 and content["command"] == "make bench" and content["quick"] is False
    assert path.name == f"peers-{content['date'][:10]}-{content['commit']}.json"
    assert content["limits"] == {"bytes_per_second": 30e9, "flops": 160e9}
    assert content["cores"] > 0 and content["memory_bytes"] > 2**30 and content["cpu"]
    assert content["versions"]["torch"].startswith("2.")
    cell = content["cells"][0]
    for name in ("cell", "engine", "runs", "rss_bytes", "startup_seconds", "roofline", "excess_overhead", "num_clean"):
        assert name in cell
    assert cell["output_tokens_per_second"] == pytest.approx(120)
    assert cell["roofline_fraction"] == pytest.approx(0.6)
    assert set(cell["time_to_first_token"]) == {"p50", "p95", "p99"} == set(cell["time_per_output_token"])
    assert len(cell["runs"]) == 3 and cell["runs"][0]["cores_others"] == 0
    assert content["ratios"][0]["median"] == pytest.approx(3) and content["ratios"][0]["reached"] is True


def test_tables_and_picture(tmp_path: Path) -> None:
    path = save(report(), "bench", tmp_path)
    text = path.with_suffix(".md").read_text()
    assert "| k8-c8 | quiver | 120.0 | 360 | 60% | - | 0.00 | 3/3 |" in text
    assert "| k8-c8 | vllm | 40.0 |" in text
    assert "| quiver: k8-c8 | vllm | 3.00 | 2.00 3.00 3.50 | 3.00 | yes | - |" in text
    assert "30.0 GB/s read, 160 GFLOP/s" in text and footnote(report())[:12] == "`make bench`"
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert all(len(row) == len(grid.names) for grid in grids(report()) for row in grid.rows)


def test_a_step_is_split_into_inside_and_between() -> None:
    (row,) = step_split([result(run(100))]).rows
    assert row == ["k8-c8", "10", "9.00", "1.00", "1.0"]
