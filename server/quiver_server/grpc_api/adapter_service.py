"""gRPC AdapterService: loads, unloads, describes and watches adapters, and moves aliases."""

from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc

from quiver.v1 import adapters_pb2, adapters_pb2_grpc
from quiver_server.adapters.admin import AdapterAdmin, UnloadPolicy
from quiver_server.adapters.entry import KnownAdapter
from quiver_server.adapters.manager import AdapterManager
from quiver_server.adapters.revision import RevisionKey
from quiver_server.auth import current_caller
from quiver_server.errors import InvalidRequestError, RequestError
from quiver_server.grpc_api.adapter_messages import adapter_message, alias_message
from quiver_server.grpc_api.status import refuse

T = TypeVar("T")

_RESCAN_SECONDS = 5.0  # how often a watched server rescans its stores for added or removed adapters
_UNLOAD_POLICIES = {
    adapters_pb2.UnloadAdapterRequest.RUNNING_UNSPECIFIED: UnloadPolicy.WAIT,
    adapters_pb2.UnloadAdapterRequest.RUNNING_WAIT: UnloadPolicy.WAIT,
    adapters_pb2.UnloadAdapterRequest.RUNNING_REFUSE: UnloadPolicy.REFUSE,
    adapters_pb2.UnloadAdapterRequest.RUNNING_CANCEL: UnloadPolicy.CANCEL,
}
_TIERS = adapters_pb2.LoadAdapterRequest.Tier


async def _or_refuse(work: Awaitable[T], context: "grpc.aio.ServicerContext[Any, Any]") -> T:
    try:
        return await work
    except RequestError as error:
        await refuse(context, error)
        raise  # `refuse` ends the call, which the type checker does not know


def _check(adapter_id: str, *, change: bool = False) -> None:
    """Raises ForbiddenError. The adapter manager refuses an empty id."""
    caller = current_caller()
    if change:
        caller.check_admin()
    if adapter_id:
        caller.check_adapter(adapter_id)


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """`quiver.v1.AdapterService`."""

    def __init__(self, adapters: AdapterManager, admin: AdapterAdmin) -> None:
        self._adapters = adapters
        self._admin = admin

    async def LoadAdapter(  # noqa: N802 - the proto file names the methods
        self,
        request: adapters_pb2.LoadAdapterRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.LoadAdapterRequest, adapters_pb2.LoadAdapterResponse]",
    ) -> adapters_pb2.LoadAdapterResponse:
        """Bring an adapter into memory."""

        async def load() -> KnownAdapter:
            _check(request.adapter_id, change=True)
            pin = request.pin if request.HasField("pin") else None
            if request.tier not in _TIERS.values():
                raise InvalidRequestError(f"tier {request.tier} is not known", "tier")
            if request.tier != _TIERS.TIER_HOST:
                return await self._admin.load(request.adapter_id, request.source, pin=pin)
            if pin is not None:
                raise InvalidRequestError("pin is about the device; with TIER_HOST it must not be set", "pin")
            return await self._admin.prefetch(request.adapter_id, request.source)

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
            if request.running not in _UNLOAD_POLICIES:
                raise InvalidRequestError(f"running {request.running} is not known", "running")
            return await self._admin.unload(request.adapter_id, _UNLOAD_POLICIES[request.running])

        freed = await _or_refuse(unload(), context)
        return adapters_pb2.UnloadAdapterResponse(freed_bytes=freed)

    async def GetAdapter(  # noqa: N802
        self,
        request: adapters_pb2.GetAdapterRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.GetAdapterRequest, adapters_pb2.GetAdapterResponse]",
    ) -> adapters_pb2.GetAdapterResponse:
        """Describe one adapter."""

        async def find() -> KnownAdapter:
            _check(request.adapter_id)
            return await self._adapters.names.require(request.adapter_id)

        entry = await _or_refuse(find(), context)
        return adapters_pb2.GetAdapterResponse(adapter=self._describe(entry))

    async def ListAdapters(  # noqa: N802
        self,
        request: adapters_pb2.ListAdaptersRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.ListAdaptersRequest, adapters_pb2.ListAdaptersResponse]",
    ) -> adapters_pb2.ListAdaptersResponse:
        """Describe every adapter that the caller may use."""
        allows = current_caller().grant.allows
        entries = [entry for entry in await self._adapters.names.entries() if allows(entry.id)]
        return adapters_pb2.ListAdaptersResponse(adapters=[self._describe(entry) for entry in entries])

    async def SetAlias(  # noqa: N802
        self,
        request: adapters_pb2.SetAliasRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.SetAliasRequest, adapters_pb2.SetAliasResponse]",
    ) -> adapters_pb2.SetAliasResponse:
        """Move an alias."""

        async def move() -> tuple[RevisionKey, RevisionKey | None]:
            _check(request.alias, change=True)
            _check(request.target)
            return await self._admin.set_alias(request.alias, request.target)

        exact, previous = await _or_refuse(move(), context)
        before = None if previous is None else alias_message(request.alias, previous)
        return adapters_pb2.SetAliasResponse(alias=alias_message(request.alias, exact), previous=before)

    async def DeleteAlias(  # noqa: N802
        self,
        request: adapters_pb2.DeleteAliasRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.DeleteAliasRequest, adapters_pb2.DeleteAliasResponse]",
    ) -> adapters_pb2.DeleteAliasResponse:
        """Take an alias away."""

        async def delete() -> RevisionKey:
            _check(request.alias, change=True)
            return await self._admin.delete_alias(request.alias)

        previous = await _or_refuse(delete(), context)
        return adapters_pb2.DeleteAliasResponse(previous=alias_message(request.alias, previous))

    async def WatchAdapters(  # noqa: N802
        self,
        request: adapters_pb2.WatchAdaptersRequest,
        context: "grpc.aio.ServicerContext[adapters_pb2.WatchAdaptersRequest, adapters_pb2.WatchAdaptersResponse]",
    ) -> AsyncIterator[adapters_pb2.WatchAdaptersResponse]:
        """Describe every adapter that the caller may use, and then what changes."""
        allows = current_caller().grant.allows
        sent: dict[str, adapters_pb2.Adapter] = {}
        with self._adapters.changes.watching() as watcher:
            await self._adapters.names.entries()
            changed = {entry.id for entry in self._adapters.names.known if allows(entry.id)}
            yield self._news(sent, changed, snapshot=True)
            while True:
                changed = await watcher.wait(_RESCAN_SECONDS)
                if not changed:
                    await self._adapters.names.entries()  # a rescan, which notes added and removed adapters
                    continue
                news = self._news(sent, {adapter_id for adapter_id in changed if allows(adapter_id)})
                if news.adapters or news.removed_ids:
                    yield news

    def _news(
        self, sent: dict[str, adapters_pb2.Adapter], ids: set[str], *, snapshot: bool = False
    ) -> adapters_pb2.WatchAdaptersResponse:
        """The current state of these adapters, where it differs from the last one sent."""
        news = adapters_pb2.WatchAdaptersResponse(snapshot=snapshot)
        for adapter_id in sorted(ids):
            entry = self._adapters.names.cached(adapter_id)
            if entry is None:
                if sent.pop(adapter_id, None) is not None:
                    news.removed_ids.append(adapter_id)
                continue
            message = self._describe(entry)
            if sent.get(adapter_id) != (still := _without_counts(message)):
                sent[adapter_id] = still
                news.adapters.append(message)
        return news

    def _describe(self, entry: KnownAdapter) -> adapters_pb2.Adapter:
        return adapter_message(entry, self._adapters)


def _without_counts(message: adapters_pb2.Adapter) -> adapters_pb2.Adapter:
    """The part whose changes are sent."""
    still = adapters_pb2.Adapter()
    still.CopyFrom(message)
    still.running = still.waiting = 0
    for revision in still.revisions:
        revision.running = 0
    return still
