"""gRPC interceptor: names, authenticates and records every call.

Health and reflection are exempt: probes have no token.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from quiver_server.auth import Authenticator, current_caller
from quiver_server.errors import RequestError
from quiver_server.grpc_api.status import refuse
from quiver_server.telemetry.call import REQUEST_ID_KEY, CallContext, enter_call, set_request_id_from_headers
from quiver_server.telemetry.call_recorder import CallRecorder

_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates each call by its bearer token, or refuses it. Records all calls."""

    def __init__(self, access: Authenticator, recorder: CallRecorder) -> None:
        self._access = access
        self._recorder = recorder

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The method's handler, recorded, or a handler of the same arity that refuses."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # None is an unknown method, which gRPC itself refuses.
        if handler is None or method.startswith(_OPEN):
            return handler
        headers = {key: str(value) for key, value in handler_call_details.invocation_metadata or ()}
        call = enter_call(method.rpartition("/")[2], headers)
        try:
            set_request_id_from_headers(headers)
            self._access.authenticate(headers.get("authorization", ""))
            call.caller = current_caller().grant.name
        except RequestError as error:
            handler = _refusing(handler, error)
        return self._recorded(handler, call)

    def _recorded(self, handler: "_Handler", call: CallContext) -> "_Handler":
        """The same handler, with the request id in the trailing metadata and its end recorded."""
        inner: Any = handler

        def name(context: "_Context") -> None:
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))  # `refuse` does so too

        async def once(request: Any, context: "_Context") -> Any:
            with self._recorder.recording(call):
                response = await inner.unary_unary(request, context)
                name(context)
            return response

        async def stream(request: Any, context: "_Context") -> AsyncIterator[Any]:
            with self._recorder.recording(call):
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
