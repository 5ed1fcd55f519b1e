"""HTTP server: routes, the middleware that authenticates and records every request, start and drain."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from ssl import SSLContext

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from quiver_server.auth import Authenticator, current_caller
from quiver_server.errors import RequestError
from quiver_server.openai_api.errors import error_response, plain_error
from quiver_server.openai_api.routes import Routes
from quiver_server.telemetry.call import (
    REQUEST_ID_KEY,
    CallContext,
    current_call,
    enter_call,
    set_request_id_from_headers,
)
from quiver_server.telemetry.call_recorder import CallRecorder
from quiver_server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PAGE = "/metrics"
_OPEN = "/health"  # and below; probes have no token
_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
_CANCEL_SECONDS = 1.0  # the time that requests have to end once they are cancelled after the grace period


class HttpServer:
    """Serves until `drain`. Lives in the event loop."""

    def __init__(
        self, routes: Routes, access: Authenticator, recorder: CallRecorder, metrics: Metrics, max_body_bytes: int
    ) -> None:
        self._access = access
        self._recorder = recorder
        self._metrics = metrics
        self._running: set[asyncio.Task[object]] = set()
        self._draining = False
        app = web.Application(middlewares=[self._guard], client_max_size=max_body_bytes)
        app.on_response_prepare.append(_name_answer)
        app.add_routes(
            [
                web.get("/health", self._ready),
                web.get("/health/ready", self._ready),
                web.get("/health/live", self._live),
                web.get(_PAGE, self._page),
                web.get("/v1/models", routes.list_models),
                web.get("/v1/models/{model}", routes.get_model),
                web.post("/v1/completions", routes.complete),
                web.post("/v1/chat/completions", routes.chat),
            ]
        )
        # aiohttp itself would log requests that are not HTTP, with the bytes that they sent.
        silent = logging.getLogger(f"{__name__}.aiohttp")
        silent.disabled = True
        self._runner = web.AppRunner(
            app, access_log=None, logger=silent, handler_cancellation=True, shutdown_timeout=_CANCEL_SECONDS
        )

    async def start(self, host: str, port: int, tls: SSLContext | None) -> str:
        """Take the port and serve; returns the address. Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls, reuse_port=False)
        await site.start()
        return f"{'http' if tls is None else 'https'}://{host}:{site.port}"

    async def drain(self, seconds: float) -> None:
        """Report not ready, give running requests `seconds` to end, then stop. New requests are refused meanwhile."""
        self._draining = True
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=seconds)
            for task in late:
                task.cancel()
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Gives each request an id and a caller, and each failure OpenAI's form."""
        if request.path.startswith(_OPEN):
            return await handler(request)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            call = enter_call(_method_of(request), request.headers)
            # Scrapes are frequent, and all the same.
            with nullcontext() if request.path == _PAGE else self._recorder.recording(call):
                return await self._answer(request, handler, call)
        finally:
            self._running.discard(task)

    async def _answer(self, request: web.Request, handler: _Handler, call: CallContext) -> web.StreamResponse:
        try:
            set_request_id_from_headers(request.headers)
            self._access.authenticate(request.headers.get("Authorization", ""))
            call.caller = current_caller().grant.name
            return await handler(request)
        except RequestError as error:
            call.refuse(error)
            return error_response(error)
        except web.HTTPException as error:
            call.code, call.reason = "INVALID_ARGUMENT", error.reason
            words = f"there is no {request.method} {request.path}" if error.status in (404, 405) else str(error.text)
            return plain_error(error.status, words, _CODES.get(error.status, "invalid_request"))
        except ConnectionError:
            raise  # the client is gone
        except Exception as error:
            call.code = "INTERNAL"
            log.error("a request failed", exc_info=error)
            return plain_error(500, "the server failed at this request", "internal")

    async def _ready(self, request: web.Request) -> web.Response:
        status = "draining" if self._draining else "ready"
        return web.json_response({"status": status}, status=503 if self._draining else 200)

    async def _page(self, request: web.Request) -> web.Response:
        """Prometheus' page. For administrators: it names all adapters."""
        current_caller().check_admin()
        page = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})


def _method_of(request: web.Request) -> str:
    """The route, not the path: metrics have a label for each, and clients must not invent them."""
    route = request.match_info.route.resource
    return "unknown" if route is None else f"{request.method} {route.canonical}"


async def _name_answer(request: web.Request, response: web.StreamResponse) -> None:
    if name := current_call().request_id:  # a probe has none
        response.headers[REQUEST_ID_KEY] = name
    response.headers["Server"] = "quiver"
