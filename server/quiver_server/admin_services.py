"""The gRPC face of the adapters and of the model: what is here, and bringing adapters in and out."""

from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from quiver.v1 import adapters_pb2, adapters_pb2_grpc, model_pb2, model_pb2_grpc
from quiver_server.access import current_caller
from quiver_server.adapter_entry import Entry, State
from quiver_server.adapter_store import AdapterStore
from quiver_server.errors import RequestError
from quiver_server.service import refuse

T = TypeVar("T")

_STATES = {
    State.REGISTERED: adapters_pb2.Adapter.STATE_REGISTERED,
    State.LOADING: adapters_pb2.Adapter.STATE_LOADING,
    State.RESIDENT: adapters_pb2.Adapter.STATE_RESIDENT,
    State.FAILED: adapters_pb2.Adapter.STATE_FAILED,
}


async def _or_refuse(work: Awaitable[T], context: "grpc.aio.ServicerContext[Any, Any]") -> T:
    try:
        return await work
    except RequestError as error:
        await refuse(context, error)
        raise  # `refuse` ends the call; this line tells the type checker so


def _check(adapter_id: str, *, change: bool = False) -> None:
    """Raises ForbiddenError. An empty id is the store's to refuse."""
    caller = current_caller()
    if change:
        caller.check_admin()
    if adapter_id:
        caller.check_adapter(adapter_id)


def adapter_message(entry: Entry, host_bytes: int) -> adapters_pb2.Adapter:
    """An adapter as the wire describes it. host_bytes: main memory that it takes beside that of the banks."""
    message = adapters_pb2.Adapter(
        id=entry.id,
        source=str(entry.folder),
        state=_STATES[entry.state],
        host_bytes=host_bytes,
        pinned=entry.pinned,
        waiting=entry.num_waiting,
    )
    if entry.failure is not None:
        message.failure_reason = str(entry.failure)
    if (resident := entry.resident) is not None:
        message.revision = resident.revision
        message.methods.extend(resident.methods)
        message.device_bytes = resident.num_bytes
        message.parameters = resident.num_parameters
        message.rank = resident.max_rank
        message.virtual_tokens = resident.num_virtual_tokens
        message.running = resident.num_leases
    return message


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """`quiver.v1.AdapterService`."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    async def LoadAdapter(  # noqa: N802 - the names are the wire's
        self,
        request: adapters_pb2.LoadAdapterRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.LoadAdapterRequest, adapters_pb2.LoadAdapterResponse]",
    ) -> adapters_pb2.LoadAdapterResponse:
        """Bring an adapter into memory."""

        async def load() -> Entry:
            _check(request.adapter_id, change=True)
            return await self._store.load(request.adapter_id, request.source, request.pin)

        entry = await _or_refuse(load(), context)
        return adapters_pb2.LoadAdapterResponse(adapter=self._describe(entry))

    async def UnloadAdapter(  # noqa: N802
        self,
        request: adapters_pb2.UnloadAdapterRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.UnloadAdapterRequest, adapters_pb2.UnloadAdapterResponse]",
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Take an adapter out of memory."""

        async def unload() -> int:
            _check(request.adapter_id, change=True)
            return await self._store.unload(request.adapter_id)

        freed = await _or_refuse(unload(), context)
        return adapters_pb2.UnloadAdapterResponse(freed_bytes=freed)

    async def GetAdapter(  # noqa: N802
        self,
        request: adapters_pb2.GetAdapterRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.GetAdapterRequest, adapters_pb2.GetAdapterResponse]",
    ) -> adapters_pb2.GetAdapterResponse:
        """Describe one adapter."""

        async def find() -> Entry:
            _check(request.adapter_id)
            return self._store.find(request.adapter_id)

        entry = await _or_refuse(find(), context)
        return adapters_pb2.GetAdapterResponse(adapter=self._describe(entry))

    async def ListAdapters(  # noqa: N802
        self,
        request: adapters_pb2.ListAdaptersRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.ListAdaptersRequest, adapters_pb2.ListAdaptersResponse]",
    ) -> adapters_pb2.ListAdaptersResponse:
        """Describe every adapter that the caller may ask."""
        allows = current_caller().grant.allows
        entries = [entry for entry in self._store.entries() if allows(entry.id)]
        return adapters_pb2.ListAdaptersResponse(adapters=[self._describe(entry) for entry in entries])

    def _describe(self, entry: Entry) -> adapters_pb2.Adapter:
        return adapter_message(entry, self._store.host_bytes(entry))


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`quiver.v1.ModelService`. description: made once, it never changes."""

    def __init__(self, description: model_pb2.GetModelResponse) -> None:
        self._description = description

    async def GetModel(  # noqa: N802
        self,
        request: model_pb2.GetModelRequest,
        context: "grpc.aio.ServicerContext[model_pb2.GetModelRequest, model_pb2.GetModelResponse]",
    ) -> model_pb2.GetModelResponse:
        """Describe the base."""
        return self._description
