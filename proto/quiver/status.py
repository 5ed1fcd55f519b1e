"""The details of a failed call: how the server writes them and how the client reads them.

They travel as one `google.rpc.Status` in the trailing metadata under `grpc-status-details-bin`, beside gRPC's
own code and message, as https://google.aip.dev/193 describes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "quiver"

# Peers may drop a call whose metadata passes 8 KiB, and then its true status is lost. These bounds leave room for
# the details in base64 (4/3 of their bytes) beside the call's own message in percent-encoding (3 times).
MAX_MESSAGE_BYTES = 1000
_MAX_VIOLATIONS = 6
_MAX_FIELD_BYTES = 100
_MAX_DESCRIPTION_BYTES = 200


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request, such as "sampling.top_p", and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What a failed call says beside its code and message."""

    field_violations: tuple[FieldViolation, ...] = ()
    retry_after_seconds: float | None = None
    reason: str = ""  # a constant such as "BUSY", for programs


def shorten(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """`text`, cut to `max_bytes` of UTF-8 with "..." at its end when it was longer."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def status_details(
    code: grpc.StatusCode,
    message: str,
    *,
    field_violations: Mapping[str, str] | None = None,
    retry_after_seconds: float | None = None,
    reason: str = "",
) -> bytes:
    """The value to put under `STATUS_DETAILS_KEY` in the trailing metadata before aborting with `code`.

    `field_violations` maps a field's path in the request to what is wrong with it. `reason` is an
    UPPER_SNAKE_CASE constant. Long texts are cut, and all but the first six violations
    left out; pass the call's own message through `shorten` too.
    """
    details: list[Message] = []
    if field_violations:
        details.append(_bad_request(field_violations))
    if retry_after_seconds is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(retry_after_seconds)))
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    number: int = code.value[0]
    return status_pb2.Status(
        code=number, message=shorten(message), details=[_pack(detail) for detail in details]
    ).SerializeToString()


def read_status_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> StatusDetails:
    """The details in a failed call's trailing metadata; empty when there are none or they cannot be read."""
    value = next((value for key, value in trailing_metadata if key == STATUS_DETAILS_KEY), b"")
    status = status_pb2.Status()
    try:
        status.ParseFromString(value if isinstance(value, bytes) else value.encode("latin-1"))
        return _unpack(status)
    except (DecodeError, UnicodeEncodeError):
        return StatusDetails()


def _unpack(status: status_pb2.Status) -> StatusDetails:
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(bad_request)
        has_retry |= detail.Unpack(retry)
        detail.Unpack(info)
    return StatusDetails(
        field_violations=tuple(FieldViolation(v.field, v.description) for v in bad_request.field_violations),
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None,
        reason=info.reason,
    )


def _bad_request(field_violations: Mapping[str, str]) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    for field, description in list(field_violations.items())[:_MAX_VIOLATIONS]:
        bad_request.field_violations.add(
            field=shorten(field, _MAX_FIELD_BYTES),
            description=shorten(description, _MAX_DESCRIPTION_BYTES),
        )
    return bad_request


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
