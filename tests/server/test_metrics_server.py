"""The pages for probes: they tell whether the event loop turns and whether requests are taken."""

import asyncio
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, Counter

from quiver_server import metrics_server


def page(port: int, path: str) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_each_page_says_how_the_server_is() -> None:
    registry = CollectorRegistry()
    Counter("quiver_requests", "Requests.", registry=registry).inc(3)
    ready = True
    port = metrics_server.serve_metrics("127.0.0.1", 0, registry, lambda: ready)

    async def get(path: str) -> tuple[int, str]:
        return await asyncio.to_thread(page, port, path)

    assert await get("/livez") == await get("/readyz") == (200, "ok\n")
    ready = False
    assert await get("/livez") == (200, "ok\n")
    assert await get("/readyz") == (503, "no\n")
    assert "quiver_requests_total 3.0" in (await get("/metrics"))[1]


async def test_a_loop_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_ANSWER_SECONDS", 0.2)
    port = metrics_server.serve_metrics("127.0.0.1", 0, CollectorRegistry(), lambda: True)
    with ThreadPoolExecutor(1) as pool:
        for path in ("/livez", "/readyz"):
            asked = pool.submit(page, port, path)
            assert asked.result(5) == (503, "no\n"), path  # waiting as no coroutine should: the loop hangs
    assert (await asyncio.to_thread(page, port, "/livez"))[0] == 200, "it turns again"


async def test_a_port_that_is_taken_is_an_error() -> None:
    port = metrics_server.serve_metrics("127.0.0.1", 0, CollectorRegistry(), lambda: True)
    with pytest.raises(OSError, match="in use"):
        metrics_server.serve_metrics("127.0.0.1", port, CollectorRegistry(), lambda: True)
