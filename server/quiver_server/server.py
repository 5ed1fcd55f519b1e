"""Starts the server's parts and its fronts, and takes them down in order."""

import asyncio
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quiver.exit_codes import FAILED, MISUSED
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.errors import QuiverError
from quiver_peft.tokenizer import Tokenizer
from quiver_server.auth import Authenticator
from quiver_server.components import BLOCK_TOKENS, Components, build, load
from quiver_server.config import ServerConfig
from quiver_server.grpc_api.adapter_service import AdapterService
from quiver_server.grpc_api.model_service import model_message
from quiver_server.grpc_api.server import GrpcServer
from quiver_server.metrics_server import serve_metrics
from quiver_server.requests.handler import RequestHandler
from quiver_server.telemetry.call_recorder import CallRecorder
from quiver_server.telemetry.tracing import open_tracing

if TYPE_CHECKING:
    from quiver_server.openai_api.server import HttpServer

log = logging.getLogger(__name__)


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a drain, else an exit code of `quiver.exit_codes`."""
    try:
        base, tokenizer = load(config)
        return asyncio.run(_serve(config, base, tokenizer))
    except QuiverError as error:
        log.error("cannot serve: %s", error)
        return MISUSED
    except (OSError, RuntimeError) as error:
        log.error("cannot serve: %s", error)
        return FAILED


@dataclass
class _Shutdown:
    """Why and when to stop. failed: not because somebody asked."""

    event: asyncio.Event
    failed: bool = False

    def fail(self) -> None:
        """The server cannot go on."""
        self.failed = True
        self.event.set()


async def _serve(config: ServerConfig, base: GPTBase | T5Base, tokenizer: Tokenizer) -> int:
    ending = _Shutdown(asyncio.Event())
    parts = build(config, base, tokenizer, ending.fail)
    try:
        return await _serve_components(config, parts, ending)
    finally:
        parts.adapters.close()


async def _serve_components(config: ServerConfig, parts: Components, ending: _Shutdown) -> int:
    access = Authenticator(config.token_file)
    tracing = open_tracing(config.otlp_endpoint)
    recorder = CallRecorder(parts.metrics, tracing)
    handler = RequestHandler(parts.request_runner, parts.tokenizer, parts.limits, parts.metrics)
    adapters = AdapterService(parts.adapters, parts.admin)
    description = model_message(config, parts.base, parts.limits, parts.kv.num_blocks * BLOCK_TOKENS)
    over_grpc = GrpcServer(config, handler, adapters, description, access, recorder)
    over_http = await _start_http(config, parts, handler, access, recorder) if config.http_port >= 0 else None
    if config.metrics_port >= 0:
        registry = parts.metrics.registry
        metrics_port = serve_metrics(
            config.host, config.metrics_port, registry, lambda: not parts.request_runner.draining
        )
        log.info("metrics on http://%s:%d/metrics", config.host, metrics_port)
    parts.engine.start()
    for reason in await parts.admin.restore_pins():
        log.error("a pinned adapter could not be loaded: %s", reason)
    await over_grpc.start()
    num_found = len(await parts.adapters.names.entries())
    log.info("serving %s on %s (%d adapters found)", config.base, over_grpc.address, num_found)
    await _until_signal(ending)
    await _drain(config, parts, over_grpc, over_http)
    if tracing is not None:
        tracing.close()
    return FAILED if ending.failed else 0


async def _start_http(
    config: ServerConfig, parts: Components, handler: RequestHandler, access: Authenticator, recorder: CallRecorder
) -> "HttpServer":
    try:
        from quiver_server.openai_api.start import start_http_server
    except ModuleNotFoundError as error:
        raise QuiverError(f"--http-port needs the package {error.name}: pip install 'quiver[http]'") from None
    front, address = await start_http_server(
        config, handler, parts.adapters, access, recorder, parts.metrics, parts.base.fingerprint
    )
    log.info("OpenAI's API on %s/v1", address)
    return front


async def _until_signal(ending: _Shutdown) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.event.set)
    await ending.event.wait()


async def _drain(
    config: ServerConfig, parts: Components, over_grpc: GrpcServer, over_http: "HttpServer | None"
) -> None:
    """Readiness off, running requests finish within the grace period, then everything stops."""
    log.info("draining: running requests have %g s to finish", config.grace_seconds)
    parts.request_runner.draining = True
    fronts = [front for front in (over_grpc, over_http) if front is not None]
    await asyncio.gather(*(front.drain(config.grace_seconds) for front in fronts))
    await parts.request_runner.wait_closed()
    parts.engine.stop()
    log.info("drained")
