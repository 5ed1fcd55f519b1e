"""Which collector is asked, and how: the standard's variables, both protocols, and what cannot be had."""

import sys

import pytest
from support.otlp_receivers import attributes, http_receiver

from quiver_peft.errors import QuiverError
from quiver_server.telemetry.call import CallContext
from quiver_server.telemetry.tracing import open_tracing


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the machine's own; and what is set here ends here."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")


def test_nobody_is_asked_unless_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(None) is None
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert open_tracing("http://127.0.0.1:1") is None


def test_the_variables_choose_http_and_the_services_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_receiver() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "support-models")
        tracing = open_tracing(None)
        assert tracing is not None
        call = CallContext("r-1", "Generate", code="INTERNAL", details={"prompt_tokens": 3, "seconds": 0.5})
        call.events["queued"] = call.started_seconds
        trace_id = tracing.record(call)
        tracing.close()
    (span,) = received.spans
    assert span.trace_id.hex() == trace_id
    assert received.resource["service.name"] == "support-models"
    assert attributes(span) == {
        "quiver.request_id": "r-1",
        "quiver.code": "INTERNAL",
        "gen_ai.usage.input_tokens": 3,
        "quiver.seconds": 0.5,
    }


def test_a_protocol_that_nobody_speaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(QuiverError, match="OTEL_EXPORTER_OTLP_PROTOCOL=http/json: must be grpc or http/protobuf"):
        open_tracing("http://127.0.0.1:1")


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # makes every attempt to import it fail
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(QuiverError, match=r"traces need the package opentelemetry: pip install 'quiver\[otel\]'"):
        open_tracing("http://127.0.0.1:1")
