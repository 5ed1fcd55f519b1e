"""Builds the server's parts from its configuration: the base in memory, the cache, the engine, the adapters' store."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quiver_peft.adapters.formats.adapter_folder import parse_adapter
from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.serving.slot_tables import SlotTables
from quiver_peft.adapters.store.files import is_url
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.paged import PagedKV
from quiver_peft.base.t5 import T5Base
from quiver_peft.device import choose_device
from quiver_peft.errors import QuiverError
from quiver_peft.kernels.cpp.library import configure_process
from quiver_peft.kernels.paged_attention import check_triton_kernels
from quiver_peft.tokenizer import Tokenizer
from quiver_server.adapters.admin import AdapterAdmin
from quiver_server.adapters.manager import AdapterManager
from quiver_server.adapters.open import open_adapters
from quiver_server.config import ServerConfig
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.engine import Delivery, Engine
from quiver_server.engine.model_runner import ModelRunner
from quiver_server.engine.scheduler import Scheduler
from quiver_server.load_metrics import LoadMetrics
from quiver_server.requests.admission import Admission
from quiver_server.requests.generation import RequestRunner, dispatch
from quiver_server.requests.limits import Limits
from quiver_server.telemetry.metrics import Metrics

BLOCK_TOKENS = 16
# On a GPU, where each has a row in the kernels' tables.
MAX_RESIDENT_ADAPTERS = 1024
_MIB = 2**20


@dataclass(frozen=True)
class Components:
    """Everything that lives as long as the server."""

    base: GPTBase | T5Base
    tokenizer: Tokenizer
    kv: PagedKV
    engine: Engine
    adapters: AdapterManager
    admin: AdapterAdmin
    request_runner: RequestRunner
    limits: Limits
    metrics: Metrics


def load(config: ServerConfig) -> tuple[GPTBase | T5Base, Tokenizer]:
    """The base, on its device. Raises QuiverError or OSError."""
    for place in config.adapters:
        if not is_url(place) and not Path(place).is_dir():
            raise QuiverError(f"--adapters {place}: no such folder; make it, it may be empty")
    device = choose_device(config.device)
    dtype = _dtype("--dtype", config.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if config.weights not in ("auto", "dtype"):
        raise QuiverError(f"--weights {config.weights}: must be auto or dtype")
    keep_storage = config.weights == "auto" and device.type == "cpu"
    base = load_base(config.base, dtype=dtype, keep_storage=keep_storage, device=device)
    if device.type == "cpu":
        pack(base)
        configure_process()
    return base, Tokenizer(config.base)


def _dtype(option: str, name: str, auto: torch.dtype) -> torch.dtype:
    """Raises QuiverError for a type that is not known."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": auto}
    if name not in dtypes:
        raise QuiverError(f"{option} {name}: must be one of {', '.join(dtypes)}")
    return dtypes[name]


def build(
    config: ServerConfig, base: GPTBase | T5Base, tokenizer: Tokenizer, on_dead: Callable[[], None]
) -> Components:
    """The components, not started. Called in the server's event loop. on_dead: called there if the engine ends."""
    loop, kv, weight = asyncio.get_running_loop(), _make_kv(config, base), base.embedding.weight
    if weight.is_cuda:
        group = base.config.num_heads // base.config.num_kv_heads
        # Now, not at the first request.
        check_triton_kernels(group, base.config.head_dim, base.compute_dtype, weight.device)
    tables = SlotTables.for_triton(base, MAX_RESIDENT_ADAPTERS)
    banks = AdapterBanks(config.adapter_memory_mib * _MIB, base.compute_dtype, weight.device, tables)
    blocks = BlockPool(kv.num_blocks, BLOCK_TOKENS, share=config.prefix_cache)
    metrics = Metrics()
    scheduler = Scheduler(blocks, config.max_running, config.max_step_tokens)

    def deliver(events: Delivery) -> None:
        loop.call_soon_threadsafe(dispatch, events)

    def fail() -> None:
        loop.call_soon_threadsafe(on_dead)

    engine = Engine(
        ModelRunner(base, banks, kv, config.max_step_tokens),
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
    generator = RequestRunner(
        engine,
        store,
        tokenizer,
        metrics,
        admission=Admission(config.max_running + config.max_waiting, config.max_adapter_share),
        limits=limits,
        max_queue_seconds=config.max_queue_seconds,
        start_token_id=base.config.start_token_id if isinstance(base, T5Base) else None,
    )
    return Components(base, tokenizer, kv, engine, store, admin, generator, limits, metrics)


def _make_kv(config: ServerConfig, base: GPTBase | T5Base) -> PagedKV:
    """As many blocks as --kv-memory-mib holds. Raises QuiverError where that is none."""
    device = base.embedding.weight.device
    dtype = _dtype("--kv-dtype", config.kv_dtype, base.compute_dtype)
    if dtype != base.compute_dtype and (device.type != "cpu" or base.compute_dtype != torch.float32):
        raise QuiverError(f"--kv-dtype {config.kv_dtype}: only a CPU that computes in float32 caches in another type")
    block_bytes = BLOCK_TOKENS * PagedKV.bytes_per_token(base.config, dtype)
    num_blocks = config.kv_memory_mib * _MIB // block_bytes
    if not num_blocks:
        raise QuiverError(
            f"--kv-memory-mib {config.kv_memory_mib}: one block of {BLOCK_TOKENS} tokens takes {block_bytes} bytes"
        )
    return PagedKV(base.config, num_blocks, BLOCK_TOKENS, dtype, device)


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
