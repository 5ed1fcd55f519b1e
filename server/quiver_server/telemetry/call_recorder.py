"""How calls end: each is one line in the log, one count, and one span where traces are wanted."""

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

from quiver_server.telemetry.call import CallContext
from quiver_server.telemetry.metrics import Metrics
from quiver_server.telemetry.tracing import Tracing

log = logging.getLogger(__name__)


class CallRecorder:
    """Records calls. tracing: None where nobody collects traces."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    @contextmanager
    def recording(self, call: CallContext) -> Generator[None]:
        """The call ends with this block, as its `code` says; cancelled, or by a fault of the server's."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit, ConnectionError):
            call.code = "CANCELLED"
            raise
        except BaseException:
            call.code = "INTERNAL" if call.code == "OK" else call.code  # a refusal has said its own
            raise
        finally:
            self._record(call)

    def _record(self, call: CallContext) -> None:
        self._metrics.calls.labels(call.method, call.code).inc()
        fields: dict[str, str | int | float] = {"call": call.method, "code": call.code, "request_id": call.request_id}
        told = {"reason": call.reason, "caller": call.caller, **call.details}
        fields.update({name: value for name, value in told.items() if value != ""})
        fields["seconds"] = round(time.monotonic() - call.started_seconds, 6)
        if self._tracing is not None:
            fields["trace_id"] = self._tracing.record(call)
        log.info("call ended", extra={"fields": fields})
