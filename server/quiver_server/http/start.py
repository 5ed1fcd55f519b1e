"""Wiring of the HTTP front."""

from quiver_peft.chat_template import read_chat_template
from quiver_server.access import Access
from quiver_server.adapter_store import AdapterStore
from quiver_server.answering import Answering
from quiver_server.call_record import CallRecorder
from quiver_server.config import ServerConfig
from quiver_server.http.front import HttpFront
from quiver_server.http.handlers import Handlers
from quiver_server.http.models import Models
from quiver_server.metrics import Metrics
from quiver_server.tls import http_context, tls_files


async def start_front(
    config: ServerConfig,
    answering: Answering,
    store: AdapterStore,
    access: Access,
    recorder: CallRecorder,
    metrics: Metrics,
    fingerprint: str,
) -> tuple[HttpFront, str]:
    """Begin to serve; returns the front and its address. fingerprint: of the base. Raises OSError and QuiverError."""
    models = Models(config.base.resolve().name, fingerprint, store)
    handlers = Handlers(answering, models, read_chat_template(config.base))
    front = HttpFront(handlers, access, recorder, metrics, config.max_message_mib * 2**20)
    files = tls_files(config)
    address = await front.start(config.host, config.http_port, None if files is None else http_context(files))
    return front, address
