"""A real gRPC server that answers from a script: what the client and the commands are tested against."""
# ruff: noqa: N802  # gRPC names the methods

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from quiver.status import STATUS_DETAILS_KEY
from quiver.v1 import adapters_pb2, generation_pb2, model_pb2
from quiver.v1.adapters_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from quiver.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from quiver.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

REVISION = "0123456789abcdef" * 4
ENDLESS = "never stop"  # the prompt whose stream ends only when the client goes away
FAIL_HALFWAY = "fail halfway"  # the prompt whose stream fails after its first piece
MODEL = model_pb2.GetModelResponse(
    name="demo",
    architecture="llama",
    vocab_size=2048,
    context_length=512,
    dtype="float32",
    device="cpu",
    fingerprint="f00d",
    parameters=1234567,
    kv_capacity_tokens=65536,
    adapter_methods=["lora"],
    server_version="0.1.0",
    default_max_new_tokens=64,
)


@dataclass(frozen=True)
class Failure:
    """How every call is to fail."""

    code: grpc.StatusCode
    message: str
    details: bytes = b""


class Script:
    """What the servicers share: how to answer, and what they were asked."""

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self.text = "one two three"
        self.adapters: dict[str, adapters_pb2.Adapter] = {}
        self.metadata: dict[str, str | bytes] = {}
        self.generate_request = generation_pb2.GenerateRequest()
        self.score_request = generation_pb2.ScoreRequest()
        self.load_request = adapters_pb2.LoadAdapterRequest()
        self.unload_request = adapters_pb2.UnloadAdapterRequest()
        self.aliases: dict[str, adapters_pb2.Alias] = {}
        self.stream_was_cancelled = threading.Event()

    def begin(self, context: grpc.ServicerContext) -> None:
        """Notes the call's metadata; ends the call when the script says that calls fail."""
        self.metadata = dict(context.invocation_metadata())
        if self.failure is not None:
            abort(context, self.failure)

    def known(self, adapter_id: str, context: grpc.ServicerContext) -> adapters_pb2.Adapter:
        """The adapter of this id; ends the call with NOT_FOUND when there is none."""
        if adapter_id not in self.adapters:
            abort(context, Failure(grpc.StatusCode.NOT_FOUND, f"no adapter {adapter_id!r}"))
        return self.adapters[adapter_id]


def abort(context: grpc.ServicerContext, failure: Failure) -> NoReturn:
    """Ends the call as `failure` says."""
    if failure.details:
        context.set_trailing_metadata(((STATUS_DETAILS_KEY, failure.details),))
    context.abort(failure.code, failure.message)


class _Generation(GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        self._begin(request, context)
        return generation_pb2.GenerateResponse(
            candidates=[
                generation_pb2.Candidate(
                    index=index,
                    text=self.script.text,
                    token_ids=[7, 8, index],
                    finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                )
                for index in range(request.sampling.n or 1)
            ],
            usage=_usage(),
            adapter=self._adapter(request),
            request_id=request.request_id or "made-by-server",
            timing=_timing(),
        )

    def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateStreamResponse]:
        self._begin(request, context)
        if request.text == ENDLESS:
            context.add_callback(self.script.stream_was_cancelled.set)
        yield generation_pb2.GenerateStreamResponse(
            text="first",
            token_ids=[1],
            adapter=self._adapter(request),
            request_id=request.request_id or "made-by-server",
        )
        if request.text == FAIL_HALFWAY:
            abort(context, Failure(grpc.StatusCode.INTERNAL, "the engine stopped"))
        while request.text == ENDLESS:
            if self.script.stream_was_cancelled.wait(0.01):
                return
            yield generation_pb2.GenerateStreamResponse(text=" more", token_ids=[2])
        yield generation_pb2.GenerateStreamResponse(
            text=" last",
            token_ids=[3],
            finish_reason=generation_pb2.FINISH_REASON_EOS,
            usage=_usage(),
            timing=_timing(),
        )

    def Score(
        self, request: generation_pb2.ScoreRequest, context: grpc.ServicerContext
    ) -> generation_pb2.ScoreResponse:
        self.script.begin(context)
        self.script.score_request = request
        answer = generation_pb2.ScoreResponse(usage=_usage(), request_id=request.request_id, timing=_timing())
        for number in range(len(request.continuations)):
            likely = generation_pb2.TokenLogprob(token_id=7, logprob=-0.5 - number)
            answer.scores.add(logprobs=[likely], total_logprob=-0.5 - number, is_greedy=number == 0)
        if request.adapter_id:
            answer.adapter.CopyFrom(generation_pb2.AdapterRef(id=request.adapter_id, revision=REVISION))
        return answer

    def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        self.script.begin(context)
        words = request.text.split()
        return generation_pb2.TokenizeResponse(
            token_ids=[len(word) for word in words], pieces=words if request.pieces else []
        )

    def _begin(self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> None:
        self.script.begin(context)
        self.script.generate_request = request

    def _adapter(self, request: generation_pb2.GenerateRequest) -> generation_pb2.AdapterRef | None:
        if not request.adapter_id:
            return None
        return generation_pb2.AdapterRef(id=request.adapter_id, revision=REVISION, methods=["lora"])


class _Adapters(AdapterServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.LoadAdapterResponse:
        self.script.begin(context)
        self.script.load_request = request
        adapter = adapters_pb2.Adapter(
            id=request.adapter_id,
            revision=REVISION,
            methods=["lora"],
            source=request.source or f"store/{request.adapter_id}",
            state=adapters_pb2.Adapter.STATE_RESIDENT,
            device_bytes=1_500_000,
            pinned=request.pin,
            rank=8,
            revisions=[adapters_pb2.Revision(revision=REVISION, state=adapters_pb2.Adapter.STATE_RESIDENT)],
        )
        self.script.adapters[request.adapter_id] = adapter
        return adapters_pb2.LoadAdapterResponse(adapter=adapter)

    def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.UnloadAdapterResponse:
        self.script.begin(context)
        self.script.unload_request = request
        adapter = self.script.known(request.adapter_id, context)
        del self.script.adapters[request.adapter_id]
        return adapters_pb2.UnloadAdapterResponse(freed_bytes=adapter.device_bytes)

    def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.GetAdapterResponse:
        self.script.begin(context)
        return adapters_pb2.GetAdapterResponse(adapter=self.script.known(request.adapter_id, context))

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.ListAdaptersResponse:
        self.script.begin(context)
        return adapters_pb2.ListAdaptersResponse(adapters=self.script.adapters.values())

    def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.SetAliasResponse:
        self.script.begin(context)
        adapter = self.script.known(request.target, context)
        alias = adapters_pb2.Alias(name=request.alias, adapter_id=request.target, revision=REVISION)
        self.script.aliases[request.alias] = alias
        adapter.aliases.append(alias)
        return adapters_pb2.SetAliasResponse(alias=alias)

    def DeleteAlias(
        self, request: adapters_pb2.DeleteAliasRequest, context: grpc.ServicerContext
    ) -> adapters_pb2.DeleteAliasResponse:
        self.script.begin(context)
        if request.alias not in self.script.aliases:
            abort(context, Failure(grpc.StatusCode.NOT_FOUND, f"no alias {request.alias!r}"))
        return adapters_pb2.DeleteAliasResponse(previous=self.script.aliases.pop(request.alias))

    def WatchAdapters(
        self, request: adapters_pb2.WatchAdaptersRequest, context: grpc.ServicerContext
    ) -> Iterator[adapters_pb2.WatchAdaptersResponse]:
        self.script.begin(context)
        yield adapters_pb2.WatchAdaptersResponse(snapshot=True, adapters=self.script.adapters.values())
        yield adapters_pb2.WatchAdaptersResponse(removed_ids=["old"])
        abort(context, Failure(grpc.StatusCode.ABORTED, "no more changes"))


class _Model(ModelServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        self.script.begin(context)
        return MODEL


def _usage() -> generation_pb2.Usage:
    return generation_pb2.Usage(prompt_tokens=5, generated_tokens=3, cached_tokens=2, virtual_tokens=20)


def _timing() -> generation_pb2.Timing:
    return generation_pb2.Timing(queue_seconds=0.25, time_to_first_token_seconds=0.5, total_seconds=0.75)


class ScriptedServer:
    """Serves all three services and the standard health service on a free port of this machine."""

    def __init__(self) -> None:
        self.script = Script()
        self._health = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8))
        add_GenerationServiceServicer_to_server(_Generation(self.script), self._server)
        add_AdapterServiceServicer_to_server(_Adapters(self.script), self._server)
        add_ModelServiceServicer_to_server(_Model(self.script), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.set_serving(True)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self._health.set("", status)

    def start(self) -> None:
        """Begins to answer."""
        self._server.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(grace=None).wait()
