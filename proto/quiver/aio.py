"""The client of a Quiver server for asyncio code: `quiver.client` with `await`."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio

from quiver import channel, response_messages
from quiver.errors import error_from_rpc
from quiver.request_messages import (
    GenerateOptions,
    ScoreOptions,
    generate_request,
    load_request,
    routing_metadata,
    score_request,
    unload_request,
)
from quiver.results import (
    Adapter,
    AdapterChanges,
    Alias,
    Generation,
    Model,
    Piece,
    Scoring,
    Tier,
    Tokens,
    UnloadPolicy,
)
from quiver.v1 import adapters_pb2, generation_pb2, model_pb2
from quiver.v1.adapters_pb2_grpc import AdapterServiceStub
from quiver.v1.generation_pb2_grpc import GenerationServiceStub
from quiver.v1.model_pb2_grpc import ModelServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """A connection to one server, made and used inside one running event loop.

        async with AsyncClient("localhost:50051") as client:
            async for piece in client.stream("Where is my order?", adapter="support"):
                print(piece.text, end="")

    Every method raises a `quiver.QuiverClientError` when the call fails.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        timeout_seconds: float | None = None,
        token: str = "",
        tls: channel.Tls | None = None,
        affinity: bool = False,
    ) -> None:
        """Connects at the first call. `timeout_seconds` bounds each call, a whole stream too; None: no bound.

        `token` is shown with each call. `tls`: connect with TLS. `affinity`: of several replicas behind a name, such as
        "dns:///NAME-replicas:50051", always send an adapter's calls to the same one.
        """
        options = channel.channel_options(affinity=affinity)
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._token_metadata = channel.token_metadata(token)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=options)
        self._generation = GenerationServiceStub(self._channel)
        self._adapters = AdapterServiceStub(self._channel)
        self._model = ModelServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection and cancels the calls that run on it."""
        await self._channel.close()

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Answers `prompt` (text or token ids). The options are those of `GenerateOptions`."""
        request = generate_request(prompt, **options)
        answer = await self._call(self._generation.Generate, request, routing_metadata(request.adapter_id))
        return response_messages.generation(answer)

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncGenerator[Piece, None]:
        """Answers `prompt` piece by piece; the call begins with the first piece asked for.

        Leaving the loop early, or closing the generator, cancels the call.
        """
        return self._pieces(generate_request(prompt, **options))

    async def _pieces(self, request: generation_pb2.GenerateRequest) -> AsyncGenerator[Piece, None]:
        metadata = routing_metadata(request.adapter_id) + self._token_metadata
        call = self._generation.GenerateStream(request, timeout=self._timeout_seconds, metadata=metadata)
        try:
            async for message in call:
                yield response_messages.piece(message)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()

    async def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]],
        **options: Unpack[ScoreOptions],
    ) -> Scoring:
        """How likely each of `continuations` (texts or token ids) is after `prompt`. Nothing is drawn."""
        request = score_request(prompt, continuations, **options)
        answer = await self._call(self._generation.Score, request, routing_metadata(request.adapter_id))
        return response_messages.scoring(answer)

    async def tokenize(self, text: str, *, pieces: bool = False) -> Tokens:
        """The token ids that `generate` would use for `text`; with `pieces` also the vocabulary's spelling."""
        request = generation_pb2.TokenizeRequest(text=text, pieces=pieces)
        return response_messages.tokens(await self._call(self._generation.Tokenize, request))

    async def load_adapter(
        self, adapter_id: str, *, source: str = "", pin: bool | None = None, tier: Tier = Tier.DEVICE
    ) -> Adapter:
        """Brings an adapter, or its newer content, into memory and returns when it can serve.

        `source` is a path or URI below a place that the server loads from; "": where it is registered, or in its
        stores. `pin`: True keeps it on the device however long it is unused, False no longer. `tier`: how near to
        bring it; `Tier.HOST` reads and validates it into main memory.
        """
        request = load_request(adapter_id, source, pin, tier)
        answer = await self._call(self._adapters.LoadAdapter, request, routing_metadata(adapter_id))
        return response_messages.adapter(answer.adapter)

    async def unload_adapter(self, adapter_id: str, *, running: UnloadPolicy = UnloadPolicy.WAIT) -> int:
        """Takes an adapter out of memory, all its revisions or that of "id@revision"; returns the bytes given back.

        `running`: what happens to its requests.
        """
        request = unload_request(adapter_id, running)
        return (await self._call(self._adapters.UnloadAdapter, request, routing_metadata(adapter_id))).freed_bytes

    async def set_alias(self, alias: str, target: str) -> Alias:
        """Makes a name answer with one exact revision: that of "id" now, of "id@revision", or of an alias.

        Requests get the revision before or the new one, never an error between; rolling back is moving it back.
        """
        request = adapters_pb2.SetAliasRequest(alias=alias, target=target)
        return response_messages.alias((await self._call(self._adapters.SetAlias, request)).alias)

    async def delete_alias(self, alias: str) -> Alias:
        """Takes an alias away; returns what it named."""
        request = adapters_pb2.DeleteAliasRequest(alias=alias)
        return response_messages.alias((await self._call(self._adapters.DeleteAlias, request)).previous)

    async def watch_adapters(self) -> AsyncGenerator[AdapterChanges, None]:
        """Every adapter as it is now, then what changes, until you leave the loop.

        After an error ask again: the first message replaces all that was known. The connection's `timeout_seconds`
        does not end it.
        """
        call = self._adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=self._token_metadata)
        try:
            async for message in call:
                yield response_messages.adapter_changes(message)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()

    async def get_adapter(self, adapter_id: str) -> Adapter:
        """Describes one adapter."""
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        answer = await self._call(self._adapters.GetAdapter, request, routing_metadata(adapter_id))
        return response_messages.adapter(answer.adapter)

    async def list_adapters(self) -> list[Adapter]:
        """Describes every adapter that the server knows, in the order of their ids."""
        answer = await self._call(self._adapters.ListAdapters, adapters_pb2.ListAdaptersRequest())
        return [response_messages.adapter(message) for message in answer.adapters]

    async def get_model(self) -> Model:
        """Describes the base model and the server's limits."""
        return response_messages.model(await self._call(self._model.GetModel, model_pb2.GetModelRequest()))

    async def is_healthy(self) -> bool:
        """Whether a server answers and can take requests now. Never raises."""
        return await self._is_serving(channel.HEALTH_CHECK_TIMEOUT_SECONDS)

    async def wait_until_ready(self, seconds: float) -> None:
        """Returns as soon as the server is healthy; raises `ServerUnavailable` when `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if await self._is_serving(min(remaining, channel.HEALTH_CHECK_TIMEOUT_SECONDS)):
                return
            await asyncio.sleep(channel.READY_POLL_SECONDS)
        raise channel.not_ready(self._target, seconds)

    async def _is_serving(self, timeout_seconds: float) -> bool:
        check = self._channel.unary_unary(channel.HEALTH_CHECK_METHOD)
        try:
            answer = await check(channel.HEALTH_CHECK_REQUEST, timeout=timeout_seconds)
        except grpc.RpcError:
            return False
        return answer == channel.HEALTH_CHECK_SERVING

    async def _call(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> _Response:
        try:
            return await method(request, timeout=self._timeout_seconds, metadata=metadata + self._token_metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
