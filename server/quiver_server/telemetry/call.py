"""One call from its first byte to its end: its name, whose it is, what is told of it in logs and traces."""

import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from quiver.status import shorten
from quiver_server.errors import RequestError, require

REQUEST_ID_KEY = "x-request-id"  # of gRPC's metadata and HTTP's headers, in both directions


@dataclass(eq=False)
class CallContext:
    """What is known of a call. Nothing in it is secret, nor said by a prompt or an answer.

    method: what was called. traceparent, tracestate: as W3C's Trace Context writes them; "" where the client sent none.
    caller: the name of its token. code: how it ended, in gRPC's words; reason: why it was refused. details: numbers and
    names of its request. moments: what began when, on the monotonic clock.
    """

    request_id: str
    method: str
    traceparent: str = ""
    tracestate: str = ""
    caller: str = ""
    code: str = "OK"
    reason: str = ""
    details: dict[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    events: dict[str, float] = field(default_factory=dict[str, float])
    started_seconds: float = field(default_factory=time.monotonic)

    def refuse(self, error: RequestError) -> None:
        """It ends with this error."""
        self.code, self.reason = error.code.name, error.reason


_call: ContextVar[CallContext | None] = ContextVar("call", default=None)


def current_call() -> CallContext:
    """The running call; outside of one, a call without a name."""
    return _call.get() or CallContext("", "")


def enter_call(method: str, headers: Mapping[str, str]) -> CallContext:
    """A call begins. headers: by lower-case name. `set_request_id_from_headers` follows, which may refuse it."""
    call = CallContext(secrets.token_hex(8), method, headers.get("traceparent", ""), headers.get("tracestate", ""))
    _call.set(call)
    return call


def set_request_id_from_headers(headers: Mapping[str, str]) -> None:
    """The running call has the name that its headers give, if they do. Raises InvalidRequestError."""
    if wanted := headers.get(REQUEST_ID_KEY, ""):
        set_request_id(wanted, REQUEST_ID_KEY)


def set_request_id(request_id: str, field: str = "request_id") -> None:
    """The running call has this name from now on. Raises InvalidRequestError."""
    most = MAX_REQUEST_ID_CHARACTERS
    ok = len(request_id) <= most and request_id.isascii() and request_id.isprintable()
    require(ok, field, shorten(repr(request_id), most), f"at most {most} printable ASCII characters")
    current_call().request_id = request_id


MAX_REQUEST_ID_CHARACTERS = 128
