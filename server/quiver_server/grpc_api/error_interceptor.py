"""gRPC interceptor: INVALID_ARGUMENT for undecodable messages, INTERNAL for uncaught exceptions, and a timeout for
clients that stop reading."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from quiver_server.errors import InvalidRequestError, RequestError, SlowReaderError
from quiver_server.grpc_api.status import refuse

log = logging.getLogger(__name__)

READER_SECONDS = 60.0  # how long the client of a stream may leave a message unread

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the deserializer and the handler of each of our methods, so that every failure becomes a RequestError."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/quiver."):
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
    async def watched(request: Any, context: "_Context") -> None:
        try:
            async with aclosing(answer(_checked(request), context)) as messages:
                async for message in messages:
                    async with asyncio.timeout(READER_SECONDS):
                        await context.write(message)
        except TimeoutError:
            await _abort_slow_reader(context)
        except Exception as error:
            await _refuse(context, error)

    return watched


def _checked(request: Any) -> Any:
    if isinstance(request, RequestError):
        raise request
    return request


async def _abort_slow_reader(context: "_Context") -> None:
    """The request has released everything by now; only the status waits until the client reads."""
    try:
        await refuse(context, SlowReaderError(f"nothing was read for {READER_SECONDS:g} s: the answer was given up"))
    except grpc.aio.InternalError:  # the client disconnected without reading
        raise asyncio.CancelledError from None


async def _refuse(context: "_Context", error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):  # refused already
        raise error
    if not isinstance(error, RequestError):
        log.error("a call failed", exc_info=error)
        error = RequestError("the server failed at this request; its log says why")
    await refuse(context, error)
