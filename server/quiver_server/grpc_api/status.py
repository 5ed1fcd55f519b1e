"""How a gRPC call ends with an error: its status and details."""

from typing import Any

import grpc

from quiver.status import STATUS_DETAILS_KEY, shorten, status_details
from quiver_server.errors import RequestError
from quiver_server.telemetry.call import REQUEST_ID_KEY, current_call


async def refuse(context: "grpc.aio.ServicerContext[Any, Any]", error: RequestError) -> None:
    """End the call with the error's status and its details."""
    call = current_call()
    call.refuse(error)
    details = status_details(
        error.code,
        str(error),
        field_violations={error.field: str(error)} if error.field else None,
        retry_after_seconds=error.retry_after_seconds,
        reason=error.reason,
    )
    trailing = ((STATUS_DETAILS_KEY, details), (REQUEST_ID_KEY, call.request_id))
    await context.abort(error.code, shorten(str(error)), trailing_metadata=trailing)
