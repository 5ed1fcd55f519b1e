"""The command line of `quiver serve`."""

from pathlib import Path
from typing import Annotated

import typer

from quiver.exit_codes import EXIT_CODES, FAILED
from quiver_server.config import ServerConfig
from quiver_server.telemetry.logs import LogFormat, configure_logging

_EPILOG = f"""
Example:  quiver serve --base models/llama --adapters adapters/   then   quiver generate --adapter mine 'Hello'

A token in --token-file is a table [[token]] with name, token or its sha256, and if wanted role ("user"; "admin" may
load and unload), adapters (patterns of ids), base (false: only adapters), requests_per_second, max_concurrent. The
file is read again when it changes.

{EXIT_CODES}"""


def _serve(
    base: Annotated[Path, typer.Option(help="The frozen base: a Hugging Face folder.")],
    adapters: Annotated[
        list[str],
        typer.Option(help="A folder or s3://, gs://, https:// URL of adapters; repeated: the first wins."),
    ],
    state: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps aliases, pins, sources and cached adapters; none: they end with this."),
    ] = None,
    cache_mib: Annotated[int, typer.Option(help="Disk for adapters' revisions, in the state folder.", min=0)] = 4096,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="gRPC port; 0 lets the system choose.", min=0, max=65535)] = 50051,
    http_port: Annotated[int, typer.Option(help="Port of OpenAI's API over HTTP; -1: none.", min=-1, max=65535)] = -1,
    metrics_port: Annotated[
        int, typer.Option(help="HTTP port of /metrics, /livez, /readyz; -1: none.", min=-1, max=65535)
    ] = 9464,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What is computed in: float32, bfloat16, float16; auto: float32 on a CPU.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="How weights are stored: auto keeps the checkpoint's 16 bits; dtype: as --dtype.")
    ] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="How keys and values are cached: float32, bfloat16, float16; auto: as --dtype.")
    ] = "auto",
    kv_memory_mib: Annotated[int, typer.Option(help="Memory for keys and values.", min=1)] = 512,
    adapter_memory_mib: Annotated[int, typer.Option(help="Memory for resident adapters.", min=1)] = 256,
    adapter_host_memory_mib: Annotated[
        int, typer.Option(help="Main memory for adapters that were read before, resident or not.", min=0)
    ] = 384,
    max_running: Annotated[int, typer.Option(help="Sequences in one batch.", min=1)] = 64,
    max_waiting: Annotated[int, typer.Option(help="Sequences in the queue; more are refused.", min=0)] = 512,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens in one step; long prompts are cut.", min=1)] = 512,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Longer prompts are refused; 0: the context's end.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Nobody may ask for more; 0: the context's end.", min=0)] = 0,
    default_max_new_tokens: Annotated[int, typer.Option(help="Where a request does not say.", min=1)] = 128,
    max_adapter_share: Annotated[
        float,
        typer.Option(help="Of --max-running and --max-waiting together, what one adapter may take.", min=0, max=1),
    ] = 0.5,
    max_message_mib: Annotated[int, typer.Option(help="Larger requests are refused.", min=1, max=1024)] = 16,
    grace_seconds: Annotated[float, typer.Option(help="How long SIGTERM lets running requests finish.")] = 30.0,
    prefix_cache: Annotated[bool, typer.Option(help="Share what prompts that begin alike have computed.")] = True,
    max_queue_seconds: Annotated[float, typer.Option(help="Who waited longer to start is refused.", min=0.001)] = 60.0,
    log_format: Annotated[LogFormat, typer.Option(help="Lines for people or JSON for programs.")] = LogFormat.TEXT,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Where traces go; as OTEL_EXPORTER_OTLP_ENDPOINT, none: nowhere.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="TOML, [[token]] tables; none: anybody may ask.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM; replaced files are used without a restart.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of --tls-cert.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM; clients must show a certificate of it.")] = None,
) -> None:
    """Serve one frozen base and any number of its adapters over gRPC, and over OpenAI's API if wanted."""
    config = ServerConfig(**locals())  # the options are its fields
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together, and --tls-client-ca needs both")
    configure_logging(log_format)
    from quiver_server.server import serve

    raise typer.Exit(serve(config))


def run(argv: list[str]) -> int:
    """Parse and serve; returns the exit code, of `quiver.exit_codes`; 0 after a drain."""
    # Without markup: it would cut long options' names short and take [[token]] for a style.
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=_EPILOG)(_serve)
    try:
        app(argv, prog_name="quiver serve")
    except SystemExit as stop:  # typer's way to return an exit code
        return stop.code if isinstance(stop.code, int) else FAILED
    return 0
