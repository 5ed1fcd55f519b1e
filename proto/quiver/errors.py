"""The client's errors, one class per thing a caller would do about it.

QuiverClientError
├── InvalidRequest       change the request        INVALID_ARGUMENT, OUT_OF_RANGE, or a message too large
├── AdapterNotFound      name another adapter      NOT_FOUND
├── BaseMismatch         train it for this base    FAILED_PRECONDITION
├── AccessDenied         show other credentials    UNAUTHENTICATED, PERMISSION_DENIED
├── ServerBusy           wait, then try again      RESOURCE_EXHAUSTED
├── ServerUnavailable    try another, or later     UNAVAILABLE
├── DeadlineExceeded     allow more time           DEADLINE_EXCEEDED
├── CallCancelled        nothing: it was wanted    CANCELLED, ABORTED (unloaded by an administrator)
└── ServerInternal       report it                 every other status
"""
# ruff: noqa: N818  # the names say what happened; "Error" at the end of each would say it twice

from collections.abc import Iterable
from typing import cast

import grpc

from quiver.status import FieldViolation, StatusDetails, read_status_details


class QuiverClientError(Exception):
    """A call failed. The text says what is wrong and, where the server said so, what to do."""

    def __init__(self, message: str, code: grpc.StatusCode, details: StatusDetails | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self._details = details or StatusDetails()

    @property
    def reason(self) -> str:
        """The server's constant for this failure, such as "BUSY"; "" when it sent none."""
        return self._details.reason


class InvalidRequest(QuiverClientError):
    """The request, or the adapter that it names, is malformed."""

    @property
    def field_violations(self) -> tuple[FieldViolation, ...]:
        """The fields that are wrong, as far as the server named them."""
        return self._details.field_violations


class AdapterNotFound(QuiverClientError):
    """No adapter has this id, alias or revision."""


class BaseMismatch(QuiverClientError):
    """The adapter was made for another base model."""


class AccessDenied(QuiverClientError):
    """The server does not let this caller do this."""


class ServerBusy(QuiverClientError):
    """The server has no room for the request now."""

    @property
    def retry_after_seconds(self) -> float | None:
        """How long the server asks to wait before the next try; None when it did not say."""
        return self._details.retry_after_seconds


class ServerUnavailable(QuiverClientError):
    """Nothing answers at the target, or the server there is starting or draining."""


class DeadlineExceeded(QuiverClientError):
    """The answer took longer than the client's `timeout_seconds`."""


class CallCancelled(QuiverClientError):
    """The call was cancelled, by this side or by an administrator who unloaded the adapter."""


class ServerInternal(QuiverClientError):
    """A fault of the server."""


_ERROR_OF_CODE: dict[grpc.StatusCode, type[QuiverClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: AdapterNotFound,
    grpc.StatusCode.FAILED_PRECONDITION: BaseMismatch,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusy,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: CallCancelled,
    grpc.StatusCode.ABORTED: CallCancelled,
}


def error_from_rpc(error: grpc.RpcError, target: str) -> QuiverClientError:
    """The client's error for a failed call to `target`, sync or async."""
    code = error.code()
    text = error.details() or ""
    # Pairs in both APIs, or None: the type that the stubs give holds for the sync one only.
    metadata = cast("Iterable[tuple[str, str | bytes]] | None", error.trailing_metadata())
    details = read_status_details(metadata or ())
    if _is_message_too_large(code, text):
        return InvalidRequest(f"the request or its answer is too large: {text}", code, details)
    return _ERROR_OF_CODE.get(code, ServerInternal)(_message(code, text, details, target), code, details)


def _is_message_too_large(code: grpc.StatusCode, text: str) -> bool:
    # gRPC itself reports this with the status of a full queue, but trying again does not help.
    return code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in text


def _message(code: grpc.StatusCode, text: str, details: StatusDetails, target: str) -> str:
    if code is grpc.StatusCode.UNAVAILABLE and not details.reason:
        return f"no answer from the server at {target}: {text}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the server at {target} did not answer within timeout_seconds: {text}"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server at {target} does not know this call (another version of Quiver?): {text}"
    if details.retry_after_seconds is not None:
        return f"{text} (try again in {details.retry_after_seconds:g} s)"
    # Violations that the message repeats already are not said twice.
    missing = [v for v in details.field_violations if v.description not in text]
    return "; ".join([text or code.name, *(f"{v.field}: {v.description}" for v in missing)])
