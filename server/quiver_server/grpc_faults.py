"""No call ends as UNKNOWN: bytes that are no message are the client's mistake, an exception nobody caught is ours."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from quiver_server.errors import InvalidRequestError, RequestError
from quiver_server.service import refuse

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]


class FaultInterceptor(grpc.aio.ServerInterceptor):
    """Gives each call of one request a deserializer and a handler that turn what goes wrong into a RequestError."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's own handler, watched over."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        make: Any = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(
            _watched_stream(handler.unary_stream) if handler.response_streaming else _watched(handler.unary_unary),
            request_deserializer=_or_error(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _or_error(read: Any) -> Callable[[bytes], Any]:
    def read_or_error(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            return InvalidRequestError(f"the request is not a message of this call: {error}")

    return read_or_error


def _watched(answer: Any) -> Any:
    async def watched(request: Any, context: "_Context") -> Any:
        try:
            return await answer(_checked(request), context)
        except Exception as error:
            await _refuse(context, error)

    return watched


def _watched_stream(answer: Any) -> Any:
    async def watched(request: Any, context: "_Context") -> AsyncIterator[Any]:
        try:
            async with aclosing(answer(_checked(request), context)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:
            await _refuse(context, error)

    return watched


def _checked(request: Any) -> Any:
    if isinstance(request, RequestError):
        raise request
    return request


async def _refuse(context: "_Context", error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):  # refused already
        raise error
    if not isinstance(error, RequestError):
        log.error("a call failed", exc_info=error)
        error = RequestError("the server failed at this request; its log says why")
    await refuse(context, error)
