"""The gRPC face of generation: messages in, pieces out, errors to statuses."""

import logging
from collections.abc import AsyncIterator

import grpc

from quiver.v1 import generation_pb2, generation_pb2_grpc
from quiver_server.errors import RequestError
from quiver_server.grpc_api.status import refuse
from quiver_server.requests.handler import RequestHandler
from quiver_server.requests.session import Piece, Session
from quiver_server.requests.validation import FINISH_REASONS, fill_score, logprob_message
from quiver_server.telemetry.call import current_call

log = logging.getLogger(__name__)

_Answer = generation_pb2.GenerateResponse | generation_pb2.GenerateStreamResponse | generation_pb2.ScoreResponse


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """`quiver.v1.GenerationService`."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler

    async def Generate(  # noqa: N802 - the name is the wire's
        self,
        request: generation_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]",
    ) -> generation_pb2.GenerateResponse:
        """Answer once, with all candidates complete."""
        response = generation_pb2.GenerateResponse()
        try:
            session = await self._handler.submit(request)
            candidates = [response.candidates.add(index=i) for i in range(session.num_candidates)]
            async for piece in self._handler.pieces(session):
                _extend(candidates[piece.index], piece)
            _describe(response, session)
            _summarize(response, session)
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
            session = await self._handler.submit(request)
            num_ended = 0
            first = True
            async for piece in self._handler.pieces(session):
                message = _piece_message(piece)
                if first:
                    _describe(message, session)
                    first = False
                num_ended += piece.finish_reason is not None
                if num_ended == session.num_candidates:
                    _summarize(message, session)
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
            session = await self._handler.submit_score(request)
            scores = [response.scores.add() for _ in range(session.num_candidates)]
            async for piece in self._handler.pieces(session):
                fill_score(scores[piece.index], piece.prompt_logprobs, request.top_logprobs)
            _describe(response, session)
            _summarize(response, session)
        except RequestError as error:
            await refuse(context, error)
        return response

    async def Tokenize(  # noqa: N802
        self,
        request: generation_pb2.TokenizeRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.TokenizeRequest, generation_pb2.TokenizeResponse]",
    ) -> generation_pb2.TokenizeResponse:
        """The ids that Generate would use for a text."""
        ids: list[int] = []
        try:
            ids = await self._handler.tokenize(request.text)
        except RequestError as error:
            await refuse(context, error)
        pieces = self._handler.tokenizer.pieces(ids) if request.pieces else []
        return generation_pb2.TokenizeResponse(token_ids=ids, pieces=pieces)


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
    message.request_id = current_call().request_id
    if session.adapter is not None:
        message.adapter.id = session.adapter.id
        message.adapter.revision = session.adapter.revision
        message.adapter.methods.extend(session.adapter.methods)


def _summarize(message: _Answer, session: Session) -> None:
    """What it took."""
    message.usage.prompt_tokens = session.num_prompt_tokens
    message.usage.virtual_tokens = session.num_virtual_tokens
    message.usage.cached_tokens = session.num_reused_tokens
    message.usage.generated_tokens = session.num_generated_tokens
    arrival = session.arrival_seconds
    message.timing.queue_seconds = (session.started_seconds or arrival) - arrival
    message.timing.time_to_first_token_seconds = (session.first_token_seconds or arrival) - arrival
    message.timing.total_seconds = (session.last_token_seconds or arrival) - arrival
