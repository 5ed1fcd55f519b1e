"""The log's forms: whatever a message holds, one line for programs, and the same told to people."""

import json
import logging
from collections.abc import Callable, Iterator
from contextvars import copy_context

import pytest
from grpc._cython import cygrpc

from quiver_server.telemetry.call import enter_call, set_request_id
from quiver_server.telemetry.logs import LogFormat, configure_logging

log = logging.getLogger("quiver_server.some_file")


@pytest.fixture
def configure() -> Iterator[Callable[[LogFormat], None]]:
    """Configures the root logger as a process of its own would: without pytest's handlers, which are put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure(form: LogFormat) -> None:
        root.handlers[:] = []
        configure_logging(form)

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_json_is_one_object_a_line(configure: Callable[[LogFormat], None], capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogFormat.JSON)
    log.warning("two\nlines and a %s", '"quote" \N{SNOWMAN}')
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    log.info("call ended", extra={"fields": {"code": "OK", "seconds": 0.5}})
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"]) == ("WARNING", "quiver_server.some_file")
    assert first["message"] == 'two\nlines and a "quote" \N{SNOWMAN}'
    assert first["time"].endswith("+00:00")
    assert second["exception"].endswith("ValueError: broken")
    assert (third["code"], third["seconds"]) == ("OK", 0.5)


def test_text_is_for_people(configure: Callable[[LogFormat], None], capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogFormat.TEXT)
    log.info("call ended", extra={"fields": {"code": "OK", "request_id": "a b", "seconds": 0.5}})
    line = capsys.readouterr().err
    assert line.endswith('INFO quiver_server.some_file: call ended code=OK request_id="a b" seconds=0.5\n')


@pytest.mark.parametrize("form", LogFormat)
def test_what_happens_within_a_call_has_its_name(
    configure: Callable[[LogFormat], None], form: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(form)
    log.info("before")

    def call() -> None:
        enter_call("Generate", {})
        set_request_id("mine-1")
        log.info("within")

    copy_context().run(call)
    before, within = capsys.readouterr().err.splitlines()
    assert "request_id" not in before
    assert "mine-1" in within


def test_a_client_that_went_while_it_was_answered_is_no_error(
    configure: Callable[[LogFormat], None], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogFormat.JSON)
    gone: Exception = cygrpc.ExecuteBatchError("gone")  # pyright: ignore # it has no stub
    for error in (gone, ValueError("broken")):
        logging.getLogger("grpc._cython.cygrpc").error("raised in core", exc_info=error)
    (told,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert "broken" in told["exception"]
