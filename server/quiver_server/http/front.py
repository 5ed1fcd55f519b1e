"""The HTTP server of the front: its routes, what every request goes through, its start and its end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from ssl import SSLContext

from aiohttp import web

from quiver_server.access import Access
from quiver_server.call import REQUEST_ID_KEY, current_call, enter_call
from quiver_server.errors import RequestError
from quiver_server.http.errors import error_response, plain_error
from quiver_server.http.handlers import Handlers

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPEN = "/health"  # and below: what probes it has no token
_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
_CANCEL_SECONDS = 1.0  # how long requests that did not end within the grace period have to be cancelled


class HttpFront:
    """Serves until `drain`. Lives in the event loop."""

    def __init__(self, handlers: Handlers, access: Access, max_body_bytes: int) -> None:
        self._access = access
        self._running: set[asyncio.Task[object]] = set()
        self._draining = False
        app = web.Application(middlewares=[self._guard], client_max_size=max_body_bytes)
        app.on_response_prepare.append(_name_answer)
        app.add_routes(
            [
                web.get("/health", self._ready),
                web.get("/health/ready", self._ready),
                web.get("/health/live", self._live),
                web.get("/v1/models", handlers.list_models),
                web.get("/v1/models/{model}", handlers.get_model),
                web.post("/v1/completions", handlers.complete),
                web.post("/v1/chat/completions", handlers.chat),
            ]
        )
        # What aiohttp itself would log are requests that are not HTTP, with the bytes that they sent.
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
        """Not ready any more; what runs has so long to end. New requests are refused until it has, then not heard."""
        self._draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """A name and a caller for each request; every failure in OpenAI's form."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            enter_call(request.headers)
            if not request.path.startswith(_OPEN):
                self._access.enter(request.headers.get("Authorization", ""))
            return await handler(request)
        except RequestError as error:
            return error_response(error)
        except web.HTTPException as error:
            words = f"there is no {request.method} {request.path}" if error.status in (404, 405) else str(error.text)
            return plain_error(error.status, words, _CODES.get(error.status, "invalid_request"))
        except ConnectionError:
            raise  # the client is gone
        except Exception as error:
            log.error("a request failed", exc_info=error)
            return plain_error(500, "the server failed at this request", "internal")
        finally:
            self._running.discard(task)

    async def _ready(self, request: web.Request) -> web.Response:
        status = "draining" if self._draining else "ready"
        return web.json_response({"status": status}, status=503 if self._draining else 200)

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})


async def _name_answer(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[REQUEST_ID_KEY] = current_call().request_id
    response.headers["Server"] = "quiver"
