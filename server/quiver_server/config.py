"""The server's configuration: flat, frozen, made once from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quiver_server.telemetry.logs import LogFormat


@dataclass(frozen=True)
class ServerConfig:
    """What `quiver serve` was asked for. Memory in MiB, the rest in tokens, rows and seconds as the names say.

    max_prompt_tokens, max_new_tokens: 0 where only the context bounds them.
    """

    base: Path
    adapters: Sequence[str]
    state: Path | None
    cache_mib: int
    host: str
    port: int
    http_port: int
    metrics_port: int
    device: str
    dtype: str
    weights: str
    kv_dtype: str
    kv_memory_mib: int
    adapter_memory_mib: int
    adapter_host_memory_mib: int
    max_running: int
    max_waiting: int
    max_step_tokens: int
    max_prompt_tokens: int
    max_new_tokens: int
    default_max_new_tokens: int
    max_adapter_share: float
    max_message_mib: int
    grace_seconds: float
    max_queue_seconds: float
    log_format: LogFormat
    otlp_endpoint: str | None
    token_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    prefix_cache: bool
