"""What every gRPC call goes through before its method: it gets a name, and is asked for its token.

Health and reflection go through nothing: what probes them has no token.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from quiver_server.access import Access
from quiver_server.call import REQUEST_ID_KEY, current_call, enter_call
from quiver_server.errors import RequestError
from quiver_server.service import refuse

_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Makes the bearer of a call's token its current caller, or refuses the call. The answer repeats the call's id."""

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
        headers = {key: str(value) for key, value in handler_call_details.invocation_metadata or ()}
        try:
            enter_call(headers)
            self._access.enter(headers.get("authorization", ""))
        except RequestError as error:
            return _refusing(handler, error)
        return _naming(handler)


def _naming(handler: "_Handler") -> "_Handler":
    """The same handler, whose trailing metadata repeat the call's id. `refuse` does so for what it ends."""
    inner: Any = handler

    def name(context: "_Context") -> None:
        context.set_trailing_metadata(((REQUEST_ID_KEY, current_call().request_id),))

    async def once(request: Any, context: "_Context") -> Any:
        response = await inner.unary_unary(request, context)
        name(context)
        return response

    async def stream(request: Any, context: "_Context") -> AsyncIterator[Any]:
        async for response in inner.unary_stream(request, context):
            yield response
        name(context)

    return _like(handler, stream if handler.response_streaming else once)


def _refusing(handler: "_Handler", error: RequestError) -> "_Handler":
    async def once(request: Any, context: "_Context") -> None:
        await refuse(context, error)

    async def stream(request: Any, context: "_Context") -> AsyncIterator[None]:
        await refuse(context, error)
        yield

    return _like(handler, stream if handler.response_streaming else once)


def _like(handler: "_Handler", behaviour: Callable[..., Any]) -> "_Handler":
    make: Any = (
        grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    )
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
