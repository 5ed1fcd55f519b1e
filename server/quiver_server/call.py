"""What a call says of itself beside its message: its name in logs and answers, and the trace that it belongs to."""

import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from quiver.status import shorten
from quiver_server.limits import MAX_REQUEST_ID_CHARACTERS, require

REQUEST_ID_KEY = "x-request-id"  # of gRPC's metadata and HTTP's headers, in both directions


@dataclass(frozen=True)
class Call:
    """One call. traceparent, tracestate: as W3C's Trace Context writes them; "" where the client sent none."""

    request_id: str
    traceparent: str = ""
    tracestate: str = ""


_NOBODYS = Call("")
_call: ContextVar[Call] = ContextVar("call", default=_NOBODYS)


def current_call() -> Call:
    """The running call; outside of one, a call without a name."""
    return _call.get()


def enter_call(headers: Mapping[str, str]) -> None:
    """A call begins. headers: by lower-case name. Raises InvalidRequestError for an id that breaks the rule."""
    traced = headers.get("traceparent", ""), headers.get("tracestate", "")
    _call.set(Call(secrets.token_hex(8), *traced))  # who is refused below has a name too
    if wanted := headers.get(REQUEST_ID_KEY, ""):
        name_call(wanted, REQUEST_ID_KEY)


def name_call(request_id: str, field: str = "request_id") -> None:
    """The running call has this name from now on. Raises InvalidRequestError."""
    most = MAX_REQUEST_ID_CHARACTERS
    ok = len(request_id) <= most and request_id.isascii() and request_id.isprintable()
    require(ok, field, shorten(repr(request_id), most), f"at most {most} printable ASCII characters")
    call = current_call()
    _call.set(Call(request_id, call.traceparent, call.tracestate))
