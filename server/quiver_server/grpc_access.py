"""Asks every gRPC call for its token, but for health and reflection: what probes them has none."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from quiver_server.access import Access
from quiver_server.errors import UnauthenticatedError
from quiver_server.service import refuse

_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Makes the bearer of a call's token its current caller, or refuses the call."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's own handler, or one of the same arity that refuses."""
        handler = await continuation(handler_call_details)
        # None: there is no such method, which gRPC says itself.
        if handler is None or handler_call_details.method.startswith(_OPEN):
            return handler
        metadata = handler_call_details.invocation_metadata or ()
        header = next((str(value) for key, value in metadata if key == "authorization"), "")
        try:
            self._access.enter(header)
        except UnauthenticatedError as error:
            return _refusing(handler, error)
        return handler


def _refusing(handler: "_Handler", error: UnauthenticatedError) -> "_Handler":
    async def once(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        await refuse(context, error)

    async def stream(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[None]:
        await refuse(context, error)
        yield

    make: Any = (
        grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    )
    return make(
        stream if handler.response_streaming else once,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
