"""The gRPC face of generation: messages in, pieces out, errors to statuses."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from quiver.status import STATUS_DETAILS_KEY, shorten, status_details
from quiver.v1 import generation_pb2, generation_pb2_grpc
from quiver_peft.tokenizer import Tokenizer
from quiver_server.errors import DrainingError, InvalidRequestError, RequestError
from quiver_server.generation import Generator, Piece, Session
from quiver_server.metrics import Metrics
from quiver_server.wire import (
    FINISH_REASONS,
    Asked,
    Limits,
    fill_score,
    logprob_message,
    read_request,
    read_score_request,
)

log = logging.getLogger(__name__)

_Answer = generation_pb2.GenerateResponse | generation_pb2.GenerateStreamResponse | generation_pb2.ScoreResponse


async def refuse(context: "grpc.aio.ServicerContext[Any, Any]", error: RequestError) -> None:
    """End the call with the error's status and its details."""
    details = status_details(
        error.code,
        str(error),
        field_violations={error.field: str(error)} if error.field else None,
        retry_after_seconds=error.retry_after_seconds,
        reason=error.reason,
    )
    await context.abort(error.code, shorten(str(error)), trailing_metadata=((STATUS_DETAILS_KEY, details),))


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """`quiver.v1.GenerationService`."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._limits = limits
        self._metrics = metrics

    async def Generate(  # noqa: N802 - the name is the wire's
        self,
        request: generation_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]",
    ) -> generation_pb2.GenerateResponse:
        """Answer once, with all candidates complete."""
        response = generation_pb2.GenerateResponse()
        try:
            session = self._open(lambda: read_request(request, self._tokenizer, self._limits))
            candidates = [response.candidates.add(index=i) for i in range(session.asked.num_candidates)]
            async for piece in self._pieces(session):
                _extend(candidates[piece.index], piece)
            _describe(response, session)
            _summarise(response, session)
        except RequestError as error:
            await refuse(context, error)
        return response

    async def GenerateStream(  # noqa: N802
        self,
        request: generation_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateStreamResponse]",
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Answer with pieces as they are generated."""
        try:
            session = self._open(lambda: read_request(request, self._tokenizer, self._limits))
            num_ended = 0
            first = True
            async for piece in self._pieces(session):
                message = _piece_message(piece)
                if first:
                    _describe(message, session)
                    first = False
                num_ended += piece.finish_reason is not None
                if num_ended == session.asked.num_candidates:
                    _summarise(message, session)
                yield message
        except RequestError as error:
            await refuse(context, error)

    async def Score(  # noqa: N802
        self,
        request: generation_pb2.ScoreRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.ScoreRequest, generation_pb2.ScoreResponse]",
    ) -> generation_pb2.ScoreResponse:
        """How likely given continuations are."""
        response = generation_pb2.ScoreResponse()
        try:
            session = self._open(lambda: read_score_request(request, self._tokenizer, self._limits))
            scores = [response.scores.add() for _ in range(session.asked.num_candidates)]
            async for piece in self._pieces(session):
                fill_score(scores[piece.index], piece.prompt_logprobs, request.top_logprobs)
            _describe(response, session)
            _summarise(response, session)
        except RequestError as error:
            await refuse(context, error)
        return response

    async def Tokenize(  # noqa: N802
        self,
        request: generation_pb2.TokenizeRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.TokenizeRequest, generation_pb2.TokenizeResponse]",
    ) -> generation_pb2.TokenizeResponse:
        """The ids that Generate would use for a text."""
        if self._generator.draining:
            await refuse(context, DrainingError("the server is stopping"))
        if not request.text:
            await refuse(context, InvalidRequestError("text is empty; it must have at least one character", "text"))
        ids = self._tokenizer.encode(request.text)
        pieces = self._tokenizer.pieces(ids) if request.pieces else []
        return generation_pb2.TokenizeResponse(token_ids=ids, pieces=pieces)

    def _open(self, read: Callable[[], Asked]) -> Session:
        try:
            return self._generator.open(read())
        except RequestError as error:
            self._metrics.requests.labels("", error.code.name).inc()
            raise

    async def _pieces(self, session: Session) -> AsyncIterator[Piece]:
        """The session's pieces, with its end counted."""
        code = "CANCELLED"
        pieces = self._generator.run(session)
        try:
            async for piece in pieces:
                yield piece
            code = "OK"
        except RequestError as error:
            code = error.code.name
            raise
        finally:
            await pieces.aclose()  # type: ignore[attr-defined] - an async generator
            adapter = session.adapter.id if session.adapter is not None else ""
            self._metrics.requests.labels(adapter, code).inc()
            self._metrics.prompt_tokens.labels(adapter).inc(session.asked.num_prompt_tokens)
            self._metrics.cached_prompt_tokens.labels(adapter).inc(session.num_reused_tokens)
            self._metrics.generated_tokens.labels(adapter).inc(session.num_generated_tokens)


def _extend(candidate: generation_pb2.Candidate, piece: Piece) -> None:
    """Add a piece to the candidate of a unary answer."""
    candidate.text += piece.text
    candidate.token_ids.append(piece.token_id)
    if piece.logprob is not None:
        candidate.logprobs.append(logprob_message(piece.logprob))
    if piece.index == 0:
        candidate.prompt_logprobs.extend(logprob_message(item) for item in piece.prompt_logprobs)
    if piece.finish_reason is not None:
        candidate.finish_reason = FINISH_REASONS[piece.finish_reason]


def _piece_message(piece: Piece) -> generation_pb2.GenerateStreamResponse:
    message = generation_pb2.GenerateStreamResponse(index=piece.index, text=piece.text, token_ids=[piece.token_id])
    if piece.logprob is not None:
        message.logprobs.append(logprob_message(piece.logprob))
    if piece.index == 0:
        message.prompt_logprobs.extend(logprob_message(item) for item in piece.prompt_logprobs)
    if piece.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[piece.finish_reason]
    return message


def _describe(message: _Answer, session: Session) -> None:
    """Who answers."""
    message.request_id = session.asked.request_id
    if session.adapter is not None:
        message.adapter.id = session.adapter.id
        message.adapter.revision = session.adapter.revision
        message.adapter.methods.extend(session.adapter.methods)


def _summarise(message: _Answer, session: Session) -> None:
    """What it took."""
    message.usage.prompt_tokens = len(session.asked.prompt)
    message.usage.virtual_tokens = session.num_virtual_tokens
    message.usage.cached_tokens = session.num_reused_tokens
    message.usage.generated_tokens = session.num_generated_tokens
    arrival = session.arrival_seconds
    message.timing.queue_seconds = (session.started_seconds or arrival) - arrival
    message.timing.time_to_first_token_seconds = (session.first_token_seconds or arrival) - arrival
    message.timing.total_seconds = (session.last_token_seconds or arrival) - arrival
