"""HTTP errors in OpenAI's form: {"error": {message, type, param, code}}, each with its HTTP status."""

import json
import math
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from grpc import StatusCode

from quiver_server.errors import RequestError, UnknownAdapterError

_STATUSES = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.UNAVAILABLE: 503,
}
_SAME_NAMES: Mapping[str, str] = {}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_DRAINING_RETRY_SECONDS = 1.0  # by then load balancers send clients to another replica


def error_body(error: RequestError, field_names: Mapping[str, str] = _SAME_NAMES) -> dict[str, Any]:
    """The error as JSON. field_names: the parameters that set the request's internal fields."""
    param, message = error.describe(field_names)
    if "[" in param and not message.startswith(param):
        message = f"{param}: {message}"
    code = "model_not_found" if isinstance(error, UnknownAdapterError) else error.reason.lower()
    return _body(message, status_of(error), param or None, code)


def error_response(error: RequestError, field_names: Mapping[str, str] = _SAME_NAMES) -> web.Response:
    """The response to a request that failed before its answer began. field_names: as in `error_body`."""
    headers: dict[str, str] = {}
    status = status_of(error)
    retry = error.retry_after_seconds
    if status == 503 and retry is None:
        retry = _DRAINING_RETRY_SECONDS
    if retry is not None:
        # The HTTP standard has whole seconds; OpenAI's clients read retry-after-ms.
        headers = {"Retry-After": str(math.ceil(retry)), "retry-after-ms": str(math.ceil(retry * 1000))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error_body(error, field_names), status=status, headers=headers, dumps=dumps)


def plain_error(status: int, message: str, code: str) -> web.Response:
    """An error of HTTP itself, such as an unknown path or a body that is too large."""
    return web.json_response(_body(message, status, None, code), status=status, dumps=dumps)


def status_of(error: RequestError) -> int:
    return _STATUSES.get(error.code, 500)


def dumps(value: object) -> str:
    """Compact JSON, without escapes for non-ASCII text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
