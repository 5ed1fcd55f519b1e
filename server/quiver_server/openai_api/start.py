"""Starts the HTTP API: builds its parts and takes the port."""

from quiver_peft.chat_template import read_chat_template
from quiver_server.adapters.manager import AdapterManager
from quiver_server.auth import Authenticator
from quiver_server.config import ServerConfig
from quiver_server.openai_api.models import Models
from quiver_server.openai_api.routes import Routes
from quiver_server.openai_api.server import HttpServer
from quiver_server.requests.handler import RequestHandler
from quiver_server.telemetry.call_recorder import CallRecorder
from quiver_server.telemetry.metrics import Metrics
from quiver_server.tls import http_context, tls_files


async def start_http_server(
    config: ServerConfig,
    handler: RequestHandler,
    adapters: AdapterManager,
    access: Authenticator,
    recorder: CallRecorder,
    metrics: Metrics,
    fingerprint: str,
) -> tuple[HttpServer, str]:
    """Start the server; returns it and its address. fingerprint: of the base. Raises OSError and QuiverError."""
    models = Models(config.base.resolve().name, fingerprint, adapters)
    routes = Routes(handler, models, read_chat_template(config.base))
    server = HttpServer(routes, access, recorder, metrics, config.max_message_mib * 2**20)
    files = tls_files(config)
    address = await server.start(config.host, config.http_port, None if files is None else http_context(files))
    return server, address
