"""Errors of one request: a class for each reaction that a client can have, each with its gRPC status.

RequestError                 the request's own failure; nobody else notices
├── InvalidRequestError      INVALID_ARGUMENT: a field has an impossible value
├── UnknownAdapterError      NOT_FOUND: no adapter has this id or revision
├── MalformedAdapterError    INVALID_ARGUMENT: the adapter's folder breaks a rule
├── OtherBaseError           FAILED_PRECONDITION: the adapter was made for another base
├── AdapterTooLargeError     INVALID_ARGUMENT: the adapter is larger than the whole adapter memory
├── UnauthenticatedError     UNAUTHENTICATED: no token, or one that nobody has
├── ForbiddenError           PERMISSION_DENIED: the token does not allow it
├── BusyError                RESOURCE_EXHAUSTED: the queue or the adapter memory is full; carries a retry hint
├── AdapterInUseError        RESOURCE_EXHAUSTED: the adapter has requests, and the caller would not wait for them
├── AdapterUnloadedError     ABORTED: the adapter was unloaded from under the request, as an administrator asked
├── StoreUnavailableError    UNAVAILABLE: the store of adapters does not answer
├── DrainingError            UNAVAILABLE: the server is stopping
├── SlowReaderError          ABORTED: the client did not read what was generated for it
└── EngineFaultError         INTERNAL: a step of the engine failed
"""

from collections.abc import Mapping

import grpc


class RequestError(Exception):
    """A failure of one request; other requests go on.

    field: the request's field that is wrong, "" if none; "prompt[2]" is the third of several. value, rule: what the
    field is and what it must be; both are "" where the message says it all.
    """

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"
    retry_after_seconds: float | None = None

    def __init__(self, message: str, field: str = "", value: object = "", rule: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.rule = rule

    def describe(self, field_names: Mapping[str, str]) -> tuple[str, str]:
        """The field and the message in an API's own terms. field_names: by internal name; other fields keep theirs."""
        name, bracket, index = self.field.partition("[")
        field = field_names.get(name, name) + bracket + index
        return field, _value_message(field, self.value, self.rule) if self.rule else str(self)


class InvalidRequestError(RequestError):
    """A field has an impossible value."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class UnknownAdapterError(RequestError):
    """No adapter has this id or revision."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_ADAPTER"


class MalformedAdapterError(RequestError):
    """The adapter's folder breaks a rule."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "MALFORMED_ADAPTER"


class OtherBaseError(RequestError):
    """The adapter was made for another base."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "OTHER_BASE"


class AdapterTooLargeError(RequestError):
    """The adapter is larger than the whole adapter memory."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "ADAPTER_TOO_LARGE"


class UnauthenticatedError(RequestError):
    """No token, or one that nobody has."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class ForbiddenError(RequestError):
    """The token does not allow it."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "FORBIDDEN"


class BusyError(RequestError):
    """No room now; the same request may succeed later."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "BUSY"
    retry_after_seconds = 1.0


class AdapterInUseError(BusyError):
    """The adapter has requests, and the caller would not wait for them."""

    reason = "ADAPTER_IN_USE"


class AdapterUnloadedError(RequestError):
    """The adapter was unloaded from under the request, as an administrator asked."""

    code = grpc.StatusCode.ABORTED
    reason = "ADAPTER_UNLOADED"


class StoreUnavailableError(RequestError):
    """The store of adapters does not answer; the same request may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "STORE_UNAVAILABLE"
    retry_after_seconds = 1.0


class DrainingError(RequestError):
    """The server is stopping."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"


class SlowReaderError(RequestError):
    """The client did not read what was generated for it."""

    code = grpc.StatusCode.ABORTED
    reason = "SLOW_READER"


class EngineFaultError(RequestError):
    """A step of the engine failed; the engine goes on with other requests."""

    reason = "ENGINE_FAULT"


def require(ok: bool, field: str, value: object, rule: str) -> None:
    """Raises InvalidRequestError with the field, its value and its rule unless `ok`."""
    if not ok:
        raise InvalidRequestError(_value_message(field, value, rule), field, value, rule)


def _value_message(field: str, value: object, rule: str) -> str:
    return f"{field} is {value}; it must be {rule}"
