"""Wiring: builds the server's parts from the configuration, starts them, and takes them down in order."""

import asyncio
import logging
import signal
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from quiver.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from quiver_peft.adapters.artifact import read_adapter
from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.adapters.configs import METHOD_ORDER
from quiver_peft.adapters.slot_tables import SlotTables
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.paged import PagedKV
from quiver_peft.base.t5 import T5Base
from quiver_peft.errors import QuiverError
from quiver_peft.kernels.native.library import take_over
from quiver_peft.kernels.paged_attention import triton_agrees
from quiver_peft.tokenizer import Tokenizer
from quiver_server.access import Access
from quiver_server.adapter_store import AdapterStore
from quiver_server.admin_services import AdapterService, ModelService
from quiver_server.admission import Admission
from quiver_server.answering import Answering
from quiver_server.blocks import BlockPool
from quiver_server.config import ServerConfig
from quiver_server.engine import Delivery, Engine
from quiver_server.generation import Generator, dispatch
from quiver_server.grpc_access import AccessInterceptor
from quiver_server.grpc_faults import FaultInterceptor
from quiver_server.limits import Limits
from quiver_server.metrics import Metrics
from quiver_server.pages import serve_pages
from quiver_server.runner import Runner
from quiver_server.scheduler import Scheduler
from quiver_server.service import GenerationService
from quiver_server.tls import grpc_credentials, tls_files
from quiver_server.weights_cache import WeightsCache

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
# On a GPU, where each has a row in the kernels' tables.
MAX_RESIDENT_ADAPTERS = 1024
_MIB = 2**20
_SERVICES = [
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
]
_OPTIONS = (
    # Two servers on one port would share its calls at random.
    ("grpc.so_reuseport", 0),
    # Clients may ping every 20 s to keep quiet streams alive through proxies.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    # A client that connects anew looks its target's addresses up again: so it finds replicas that came later.
    ("grpc.max_connection_age_ms", 600_000),
    # A client whose machine is gone without a word is noticed, and its rows are freed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@dataclass(frozen=True)
class Parts:
    """Everything that lives as long as the server."""

    base: GPTBase | T5Base
    tokenizer: Tokenizer
    kv: PagedKV
    engine: Engine
    store: AdapterStore
    generator: Generator
    limits: Limits
    metrics: Metrics


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a drain, 1 when the server could not start or go on."""
    try:
        base, tokenizer = _load(config)
        return asyncio.run(_serve(config, base, tokenizer))
    except (QuiverError, OSError, RuntimeError) as error:
        log.error("cannot serve: %s", error)
        return 1


def _load(config: ServerConfig) -> tuple[GPTBase | T5Base, Tokenizer]:
    if not config.adapters.is_dir():
        raise NotADirectoryError(f"--adapters {config.adapters}: no such folder; make it, it may be empty")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtypes["auto"] = torch.float32 if device == "cpu" else torch.bfloat16
    if config.dtype not in dtypes:
        raise QuiverError(f"--dtype {config.dtype}: must be one of {', '.join(dtypes)}")
    base = load_base(config.base, dtype=dtypes[config.dtype], device=device)
    if device == "cpu":
        pack(base)
        take_over()
    return base, Tokenizer(config.base)


@dataclass
class _Ending:
    """Why and when to stop. failed: not because somebody asked."""

    event: asyncio.Event
    failed: bool = False

    def fail(self) -> None:
        """The server cannot go on."""
        self.failed = True
        self.event.set()


def _build(config: ServerConfig, base: GPTBase | T5Base, tokenizer: Tokenizer, ending: _Ending) -> Parts:
    """The parts, unstarted. Called in the event loop that will serve."""
    loop = asyncio.get_running_loop()
    weight = base.embedding.weight
    block_bytes = BLOCK_TOKENS * PagedKV.bytes_per_token(base.config, weight.dtype)
    num_blocks = config.kv_memory_mib * _MIB // block_bytes
    if not num_blocks:
        raise QuiverError(
            f"--kv-memory-mib {config.kv_memory_mib}: one block of {BLOCK_TOKENS} tokens takes {block_bytes} bytes"
        )
    kv = PagedKV(base.config, num_blocks, BLOCK_TOKENS, weight.dtype, weight.device)
    if weight.is_cuda:
        group = base.config.num_heads // base.config.num_kv_heads
        triton_agrees(group, base.config.head_dim, weight.dtype, weight.device)  # now, not at the first request
    tables = SlotTables.where_they_help(base, MAX_RESIDENT_ADAPTERS)
    banks = AdapterBanks(config.adapter_memory_mib * _MIB, weight.dtype, weight.device, tables)
    blocks = BlockPool(num_blocks, BLOCK_TOKENS, share=config.prefix_cache)
    metrics = Metrics(blocks)

    def deliver(events: Delivery) -> None:
        loop.call_soon_threadsafe(dispatch, events)

    def fail() -> None:
        loop.call_soon_threadsafe(ending.fail)

    engine = Engine(
        Runner(base, banks, kv, config.max_step_tokens),
        Scheduler(blocks, config.max_running, config.max_step_tokens),
        block_size=BLOCK_TOKENS,
        device=weight.device,
        metrics=metrics,
        deliver=deliver,
        on_dead=fail,
    )
    read = partial(read_adapter, base=base, tokenizer_digest=tokenizer.digest)
    weights = WeightsCache(read, config.adapter_host_memory_mib * _MIB)
    store = AdapterStore(config.adapters, banks, weights, metrics)
    limits = _limits(config, base, tokenizer, num_blocks * BLOCK_TOKENS)
    generator = Generator(
        engine,
        store,
        tokenizer,
        metrics,
        admission=Admission(config.max_running + config.max_waiting, config.max_adapter_share),
        limits=limits,
        max_queue_seconds=config.max_queue_seconds,
        start_token_id=base.config.start_token_id if isinstance(base, T5Base) else None,
    )
    return Parts(base, tokenizer, kv, engine, store, generator, limits, metrics)


def _limits(config: ServerConfig, base: GPTBase | T5Base, tokenizer: Tokenizer, kv_tokens: int) -> Limits:
    """Raises QuiverError for a default that nobody may ask for."""
    is_t5 = isinstance(base, T5Base)
    # One block less for two tables, which are both rounded up to whole blocks.
    capacity = kv_tokens - is_t5 * BLOCK_TOKENS
    context_length = min(base.config.max_positions or capacity, capacity)
    if 0 < config.max_new_tokens < config.default_max_new_tokens:
        raise QuiverError(
            f"--default-max-new-tokens {config.default_max_new_tokens}: must be at most --max-new-tokens "
            f"{config.max_new_tokens}"
        )
    return Limits(
        vocab_size=base.config.vocab_size,
        longest_token=tokenizer.longest_token,
        context_length=context_length,
        max_prompt=min(config.max_prompt_tokens or context_length, context_length),
        max_new=min(config.max_new_tokens or context_length, context_length),
        max_source_length=config.max_step_tokens if is_t5 else None,
        default_max_new_tokens=config.default_max_new_tokens,
        eos_ids=frozenset(base.config.eos_token_ids),
    )


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
    parts = _build(config, base, tokenizer, ending)
    access = Access(config.token_file)
    message_bytes = config.max_message_mib * _MIB
    options = (
        *_OPTIONS,
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", 4 * message_bytes),
    )
    server = grpc.aio.server(options=options, interceptors=[AccessInterceptor(access), FaultInterceptor()])
    answering = Answering(parts.generator, tokenizer, parts.limits, parts.metrics)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(answering), server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(parts.store), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(_describe(config, parts)), server)
    healths = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    reflection.enable_server_reflection([*_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME], server)
    port = _bind(config, server)
    if config.metrics_port >= 0:
        registry = parts.metrics.registry
        metrics_port = serve_pages(config.host, config.metrics_port, registry, lambda: not parts.generator.draining)
        log.info("metrics on http://%s:%d/metrics", config.host, metrics_port)
    parts.engine.start()
    await server.start()
    for name in ("", *_SERVICES):
        await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving %s on %s:%d (%d adapters found)", config.base, config.host, port, len(parts.store.entries()))
    await _until_signal(ending)
    await _drain(config, parts, server, healths)
    return int(ending.failed)


def _bind(config: ServerConfig, server: grpc.aio.Server) -> int:
    """Take the gRPC port; returns its number."""
    address = f"{config.host}:{config.port}"
    if (files := tls_files(config)) is not None:
        return server.add_secure_port(address, grpc_credentials(files))
    if config.token_file is not None and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("tokens travel in the clear: give --tls-cert, or keep TLS in front of this server")
    return server.add_insecure_port(address)


async def _until_signal(ending: _Ending) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.event.set)
    await ending.event.wait()


async def _drain(config: ServerConfig, parts: Parts, server: grpc.aio.Server, healths: HealthServicer) -> None:
    """Readiness off, running requests finish within the grace period, then everything stops."""
    log.info("draining: running requests have %g s to finish", config.grace_seconds)
    parts.generator.draining = True
    await healths.enter_graceful_shutdown()
    await server.stop(config.grace_seconds)
    await parts.generator.wait_closed()
    parts.engine.stop()
    parts.store.close()
    log.info("drained")
