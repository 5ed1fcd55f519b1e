"""gRPC GenerationService: generates, streams, scores and tokenizes through the shared request handler."""

from collections.abc import AsyncIterator

import grpc

from quiver.v1 import generation_pb2, generation_pb2_grpc
from quiver_server.errors import RequestError
from quiver_server.grpc_api.messages import extend_candidate, fill_score, piece_message, set_adapter, set_usage
from quiver_server.grpc_api.requests import (
    GENERATION_FIELDS,
    SCORING_FIELDS,
    read_generation_request,
    read_scoring_request,
)
from quiver_server.grpc_api.status import refuse
from quiver_server.requests.handler import RequestHandler
from quiver_server.telemetry.call import current_call, set_request_id


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """`quiver.v1.GenerationService`."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler

    async def Generate(  # noqa: N802 - the proto file names the methods
        self,
        request: generation_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]",
    ) -> generation_pb2.GenerateResponse:
        """Answer once, with all candidates complete."""
        response = generation_pb2.GenerateResponse()
        try:
            _set_request_id(request.request_id)
            session = await self._handler.open_session(read_generation_request(request))
            candidates = [response.candidates.add(index=i) for i in range(session.num_candidates)]
            async for piece in self._handler.pieces(session):
                extend_candidate(candidates[piece.index], piece)
            set_adapter(response, session, current_call().request_id)
            set_usage(response, session)
        except RequestError as error:
            await refuse(context, error, GENERATION_FIELDS)
        return response

    async def GenerateStream(  # noqa: N802
        self,
        request: generation_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateStreamResponse]",
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Answer with pieces as they are generated."""
        try:
            _set_request_id(request.request_id)
            session = await self._handler.open_session(read_generation_request(request))
            num_ended = 0
            first = True
            async for piece in self._handler.pieces(session):
                message = piece_message(piece)
                if first:
                    set_adapter(message, session, current_call().request_id)
                    first = False
                num_ended += piece.finish_reason is not None
                if num_ended == session.num_candidates:
                    set_usage(message, session)
                yield message
        except RequestError as error:
            await refuse(context, error, GENERATION_FIELDS)

    async def Score(  # noqa: N802
        self,
        request: generation_pb2.ScoreRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.ScoreRequest, generation_pb2.ScoreResponse]",
    ) -> generation_pb2.ScoreResponse:
        """Report the log-probabilities of given continuations."""
        response = generation_pb2.ScoreResponse()
        try:
            _set_request_id(request.request_id)
            session = await self._handler.open_session(read_scoring_request(request))
            scores = [response.scores.add() for _ in range(session.num_candidates)]
            async for piece in self._handler.pieces(session):
                fill_score(scores[piece.index], piece.prompt_logprobs, request.top_logprobs)
            set_adapter(response, session, current_call().request_id)
            set_usage(response, session)
        except RequestError as error:
            await refuse(context, error, SCORING_FIELDS)
        return response

    async def Tokenize(  # noqa: N802
        self,
        request: generation_pb2.TokenizeRequest,
        context: "grpc.aio.ServicerContext[generation_pb2.TokenizeRequest, generation_pb2.TokenizeResponse]",
    ) -> generation_pb2.TokenizeResponse:
        """Report the token ids that Generate would use for a text."""
        ids: list[int] = []
        try:
            ids = await self._handler.tokenize(request.text)
        except RequestError as error:
            await refuse(context, error)
        pieces = self._handler.tokenizer.pieces(ids) if request.pieces else []
        return generation_pb2.TokenizeResponse(token_ids=ids, pieces=pieces)


def _set_request_id(request_id: str) -> None:
    if request_id:
        set_request_id(request_id)
