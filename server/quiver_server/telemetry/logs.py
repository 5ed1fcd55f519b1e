"""The log's two forms: lines for people, or JSON objects for programs. Each names the call that it is about."""

import json
import logging
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from quiver_server.telemetry.call import current_call


class LogFormat(StrEnum):
    """What `--log-format` takes."""

    TEXT = "text"
    JSON = "json"


class _TextFormatter(logging.Formatter):
    """time level logger: message key=value ..."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """The line without an exception's."""
        return " ".join([super().formatMessage(record), *(f"{k}={_plain(v)}" for k, v in _fields(record).items())])


class _JsonFormatter(logging.Formatter):
    """One object in one line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(form: LogFormat) -> None:
    """Everything that is logged in this process, and Python's warnings, go to standard error in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form is LogFormat.JSON else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(_without_vanished_clients)
    logging.captureWarnings(True)


def _without_vanished_clients(record: logging.LogRecord) -> bool:
    """gRPC logs an error, with a traceback, when a client goes just while its answer is being sent."""
    return record.exc_info is None or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record carries beside its message; a record of a running call at least carries its name."""
    fields: dict[str, Any] | None = getattr(record, "fields", None)
    if fields is not None:
        return fields
    name = current_call().request_id
    return {"request_id": name} if name else {}


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(c in text for c in ' "=') else text
