"""Starts the server's parts and its fronts, and takes them down in order."""

import asyncio
import logging
import signal
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from quiver.exit_codes import FAILED, MISUSED
from quiver.v1 import model_pb2
from quiver_peft.adapters.configs import METHOD_ORDER
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.errors import QuiverError
from quiver_peft.tokenizer import Tokenizer
from quiver_server.access import Access
from quiver_server.admin_services import AdapterService
from quiver_server.answering import Answering
from quiver_server.building import BLOCK_TOKENS, Parts, build, load
from quiver_server.call_record import CallRecorder
from quiver_server.config import ServerConfig
from quiver_server.grpc_front import GrpcFront
from quiver_server.pages import serve_pages
from quiver_server.tracing import open_tracing

if TYPE_CHECKING:
    from quiver_server.http.front import HttpFront

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
class _Ending:
    """Why and when to stop. failed: not because somebody asked."""

    event: asyncio.Event
    failed: bool = False

    def fail(self) -> None:
        """The server cannot go on."""
        self.failed = True
        self.event.set()


def _describe(config: ServerConfig, parts: Parts) -> model_pb2.GetModelResponse:
    weight = parts.base.embedding.weight
    return model_pb2.GetModelResponse(
        name=config.base.resolve().name,
        architecture=parts.base.config.family,
        vocab_size=parts.limits.vocab_size,
        context_length=parts.limits.context_length,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        fingerprint=parts.base.fingerprint,
        parameters=parts.base.num_parameters,
        kv_capacity_tokens=parts.kv.num_blocks * BLOCK_TOKENS,
        adapter_methods=METHOD_ORDER,
        server_version=version("quiver"),
        default_max_new_tokens=config.default_max_new_tokens,
    )


async def _serve(config: ServerConfig, base: GPTBase | T5Base, tokenizer: Tokenizer) -> int:
    ending = _Ending(asyncio.Event())
    parts = build(config, base, tokenizer, ending.fail)
    try:
        return await _serve_parts(config, parts, ending)
    finally:
        parts.store.close()


async def _serve_parts(config: ServerConfig, parts: Parts, ending: _Ending) -> int:
    access = Access(config.token_file)
    tracing = open_tracing(config.otlp_endpoint)
    recorder = CallRecorder(parts.metrics, tracing)
    answering = Answering(parts.generator, parts.tokenizer, parts.limits, parts.metrics)
    adapters = AdapterService(parts.store, parts.admin)
    over_grpc = GrpcFront(config, answering, adapters, _describe(config, parts), access, recorder)
    over_http = await _start_http(config, parts, answering, access, recorder) if config.http_port >= 0 else None
    if config.metrics_port >= 0:
        registry = parts.metrics.registry
        metrics_port = serve_pages(config.host, config.metrics_port, registry, lambda: not parts.generator.draining)
        log.info("metrics on http://%s:%d/metrics", config.host, metrics_port)
    parts.engine.start()
    for reason in await parts.admin.restore_pins():
        log.error("a pinned adapter could not be loaded: %s", reason)
    await over_grpc.start()
    num_found = len(await parts.store.names.entries())
    log.info("serving %s on %s (%d adapters found)", config.base, over_grpc.address, num_found)
    await _until_signal(ending)
    await _drain(config, parts, over_grpc, over_http)
    if tracing is not None:
        tracing.close()
    return FAILED if ending.failed else 0


async def _start_http(
    config: ServerConfig, parts: Parts, answering: Answering, access: Access, recorder: CallRecorder
) -> "HttpFront":
    try:
        from quiver_server.http.start import start_front
    except ModuleNotFoundError as error:
        raise QuiverError(f"--http-port needs the package {error.name}: pip install 'quiver[http]'") from None
    front, address = await start_front(
        config, answering, parts.store, access, recorder, parts.metrics, parts.base.fingerprint
    )
    log.info("OpenAI's API on %s/v1", address)
    return front


async def _until_signal(ending: _Ending) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.event.set)
    await ending.event.wait()


async def _drain(config: ServerConfig, parts: Parts, over_grpc: GrpcFront, over_http: "HttpFront | None") -> None:
    """Readiness off, running requests finish within the grace period, then everything stops."""
    log.info("draining: running requests have %g s to finish", config.grace_seconds)
    parts.generator.draining = True
    fronts = [front for front in (over_grpc, over_http) if front is not None]
    await asyncio.gather(*(front.drain(config.grace_seconds) for front in fronts))
    await parts.generator.wait_closed()
    parts.engine.stop()
    log.info("drained")
