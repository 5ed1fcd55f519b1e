"""Wiring: builds the server's parts from the configuration, starts them, and takes them down in order."""

import asyncio
import logging
import signal
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quiver.v1 import model_pb2
from quiver_peft.adapters.artifact import parse_adapter
from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.adapters.configs import METHOD_ORDER
from quiver_peft.adapters.slot_tables import SlotTables
from quiver_peft.adapters.store_files import is_url
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
from quiver_server.adapter_admin import AdapterAdmin
from quiver_server.adapter_opening import open_adapters
from quiver_server.adapter_store import AdapterStore
from quiver_server.admin_services import AdapterService
from quiver_server.admission import Admission
from quiver_server.answering import Answering
from quiver_server.blocks import BlockPool
from quiver_server.call_record import CallRecorder
from quiver_server.config import ServerConfig
from quiver_server.engine import Delivery, Engine
from quiver_server.generation import Generator, dispatch
from quiver_server.grpc_front import GrpcFront
from quiver_server.limits import Limits
from quiver_server.load_metrics import LoadMetrics
from quiver_server.metrics import Metrics
from quiver_server.pages import serve_pages
from quiver_server.runner import Runner
from quiver_server.scheduler import Scheduler
from quiver_server.tracing import open_tracing

if TYPE_CHECKING:
    from quiver_server.http.front import HttpFront

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
# On a GPU, where each has a row in the kernels' tables.
MAX_RESIDENT_ADAPTERS = 1024
_MIB = 2**20


@dataclass(frozen=True)
class Parts:
    """Everything that lives as long as the server."""

    base: GPTBase | T5Base
    tokenizer: Tokenizer
    kv: PagedKV
    engine: Engine
    store: AdapterStore
    admin: AdapterAdmin
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
    for place in config.adapters:
        if not is_url(place) and not Path(place).is_dir():
            raise NotADirectoryError(f"--adapters {place}: no such folder; make it, it may be empty")
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
    kv = _make_kv(config, base)
    weight = base.embedding.weight
    if weight.is_cuda:
        group = base.config.num_heads // base.config.num_kv_heads
        triton_agrees(group, base.config.head_dim, weight.dtype, weight.device)  # now, not at the first request
    tables = SlotTables.where_they_help(base, MAX_RESIDENT_ADAPTERS)
    banks = AdapterBanks(config.adapter_memory_mib * _MIB, weight.dtype, weight.device, tables)
    blocks = BlockPool(kv.num_blocks, BLOCK_TOKENS, share=config.prefix_cache)
    metrics = Metrics()
    scheduler = Scheduler(blocks, config.max_running, config.max_step_tokens)

    def deliver(events: Delivery) -> None:
        loop.call_soon_threadsafe(dispatch, events)

    def fail() -> None:
        loop.call_soon_threadsafe(ending.fail)

    engine = Engine(
        Runner(base, banks, kv, config.max_step_tokens),
        scheduler,
        block_size=BLOCK_TOKENS,
        device=weight.device,
        metrics=metrics,
        deliver=deliver,
        on_dead=fail,
    )
    store, admin = open_adapters(
        config.adapters,
        config.state,
        banks,
        partial(parse_adapter, base=base, tokenizer_digest=tokenizer.digest),
        metrics,
        host_bytes=config.adapter_host_memory_mib * _MIB,
        disk_bytes=config.cache_mib * _MIB,
    )
    name = config.base.resolve().name
    metrics.registry.register(LoadMetrics(name, scheduler, blocks, store, MAX_RESIDENT_ADAPTERS))
    limits = _limits(config, base, tokenizer, kv.num_blocks * BLOCK_TOKENS)
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
    return Parts(base, tokenizer, kv, engine, store, admin, generator, limits, metrics)


def _make_kv(config: ServerConfig, base: GPTBase | T5Base) -> PagedKV:
    """As many blocks as --kv-memory-mib holds. Raises QuiverError where that is none."""
    weight = base.embedding.weight
    block_bytes = BLOCK_TOKENS * PagedKV.bytes_per_token(base.config, weight.dtype)
    num_blocks = config.kv_memory_mib * _MIB // block_bytes
    if not num_blocks:
        raise QuiverError(
            f"--kv-memory-mib {config.kv_memory_mib}: one block of {BLOCK_TOKENS} tokens takes {block_bytes} bytes"
        )
    return PagedKV(base.config, num_blocks, BLOCK_TOKENS, weight.dtype, weight.device)


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
    return int(ending.failed)


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
