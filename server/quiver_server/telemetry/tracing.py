"""OpenTelemetry: each call a span with the moments of its request, sent in the background over OTLP.

Everything that the standard's OTEL_* variables say of exporters, samplers, batches and resources is obeyed, by its SDK.
"""

import os
import threading
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from quiver_peft.errors import QuiverError
from quiver_server.telemetry.call import CallContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CLOSE_SECONDS = 3.0  # how long the last spans may take; a collector that is gone keeps no server alive
# What OpenTelemetry's conventions for generative AI call some of our numbers; the others keep their names.
_ATTRIBUTES = {
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
}


def open_tracing(endpoint: str | None) -> "Tracing | None":
    """Traces, where they are wanted. endpoint: None leaves it to the environment. Raises QuiverError."""
    if endpoint is not None:
        os.environ[_ENDPOINT] = endpoint
    wanted = os.environ.get(_ENDPOINT) or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return Tracing() if wanted and not off else None


class Tracing:
    """Makes spans of calls that have ended. Raises QuiverError without its packages, or for an unknown protocol."""

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = _exporter()
        except ModuleNotFoundError as error:
            raise QuiverError(f"traces need the package {error.name}: pip install 'quiver[otel]'") from None
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        own = {SERVICE_VERSION: version("quiver")} | ({} if named else {SERVICE_NAME: "quiver"})
        self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("quiver")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def record(self, call: CallContext) -> str:
        """The span of a call that ends now, within the trace that its client named. Returns the trace's id."""
        offset = time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            return offset + int(seconds * 1e9)

        trace = self._trace
        details = {_ATTRIBUTES.get(name, f"quiver.{name}"): value for name, value in call.details.items()}
        span = self._tracer.start_span(
            call.method,
            context=self._propagator.extract({"traceparent": call.traceparent, "tracestate": call.tracestate}),
            kind=trace.SpanKind.SERVER,
            attributes={"quiver.request_id": call.request_id, "quiver.code": call.code, **details},
            start_time=at(call.started_seconds),
        )
        for name, seconds in call.events.items():
            span.add_event(name, timestamp=at(seconds))
        if call.code != "OK":
            span.set_status(trace.Status(trace.StatusCode.ERROR, call.reason or call.code))
        span.end()
        return trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Send what is left, as long as that takes little time."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_CLOSE_SECONDS)


def _exporter() -> "SpanExporter":
    """The one of the protocol that the environment asks for; gRPC where it does not say."""
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    raise QuiverError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: must be grpc or http/protobuf")
