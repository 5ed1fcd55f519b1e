"""gRPC errors: ends a call with the status and the details of a RequestError."""

from collections.abc import Mapping
from typing import Any

import grpc

from quiver.status import STATUS_DETAILS_KEY, shorten, status_details
from quiver_server.errors import RequestError
from quiver_server.telemetry.call import REQUEST_ID_KEY, current_call

_SAME_NAMES: Mapping[str, str] = {}


async def refuse(
    context: "grpc.aio.ServicerContext[Any, Any]", error: RequestError, field_names: Mapping[str, str] = _SAME_NAMES
) -> None:
    """End the call with the error's status and details. field_names: where internal fields are in the message."""
    call = current_call()
    call.refuse(error)
    field, message = error.describe(field_names)
    details = status_details(
        error.code,
        message,
        field_violations={field: message} if field else None,
        retry_after_seconds=error.retry_after_seconds,
        reason=error.reason,
    )
    trailing = ((STATUS_DETAILS_KEY, details), (REQUEST_ID_KEY, call.request_id))
    await context.abort(error.code, shorten(message), trailing_metadata=trailing)
