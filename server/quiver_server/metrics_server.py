"""The plain HTTP pages on the metrics port: /metrics for Prometheus, /livez and /readyz for probes.

Kubernetes' gRPC probes speak no TLS, so where the gRPC port does, these pages tell how the server is.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from prometheus_client import CollectorRegistry, MetricsHandler

# The event loop is asked; what has not answered by then hangs. Less than a probe waits.
_ANSWER_SECONDS = 3.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def serve_metrics(host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> int:
    """Answer from threads of their own; returns the port (of the system's choice for 0).

    Called in the event loop that serves: /livez is 200 while that loop turns, /readyz while it also finds `is_ready`;
    otherwise 503. Raises OSError where the port is taken.
    """
    loop = asyncio.get_running_loop()

    async def ready() -> bool:
        return is_ready()

    async def live() -> bool:
        return True

    checks = {"/livez": live, "/readyz": ready}

    class Handler(MetricsHandler):
        def do_GET(self) -> None:  # noqa: N802  # http.server names it
            check = checks.get(self.path)
            if check is None:
                return super().do_GET()
            answer = asyncio.run_coroutine_threadsafe(check(), loop)
            try:
                good = answer.result(_ANSWER_SECONDS)
            except (TimeoutError, CancelledError):  # the loop hangs, or ends
                good = False
            self.send_response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)
            self.end_headers()
            self.wfile.write(b"ok\n" if good else b"no\n")

    Handler.registry = registry
    server = _Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port
