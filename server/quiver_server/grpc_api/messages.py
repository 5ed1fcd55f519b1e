"""gRPC responses: writes pieces, log-probabilities and sessions as the protobuf messages of GenerationService."""

import math
from collections.abc import Sequence
from dataclasses import replace

from quiver.v1 import generation_pb2
from quiver_server.engine.sequence import FinishReason, TokenLogprob
from quiver_server.requests.session import Piece, Session

FINISH_REASONS = {
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

_Response = generation_pb2.GenerateResponse | generation_pb2.GenerateStreamResponse | generation_pb2.ScoreResponse


def extend_candidate(candidate: generation_pb2.Candidate, piece: Piece) -> None:
    """Add a piece to the candidate of a unary response."""
    candidate.text += piece.text
    candidate.token_ids.append(piece.token_id)
    if piece.logprob is not None:
        candidate.logprobs.append(logprob_message(piece.logprob))
    if piece.index == 0:
        candidate.prompt_logprobs.extend(logprob_message(item) for item in piece.prompt_logprobs)
    if piece.finish_reason is not None:
        candidate.finish_reason = FINISH_REASONS[piece.finish_reason]


def piece_message(piece: Piece) -> generation_pb2.GenerateStreamResponse:
    """A piece as one message of a stream."""
    message = generation_pb2.GenerateStreamResponse(index=piece.index, text=piece.text, token_ids=[piece.token_id])
    if piece.logprob is not None:
        message.logprobs.append(logprob_message(piece.logprob))
    if piece.index == 0:
        message.prompt_logprobs.extend(logprob_message(item) for item in piece.prompt_logprobs)
    if piece.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[piece.finish_reason]
    return message


def logprob_message(item: TokenLogprob) -> generation_pb2.TokenLogprob:
    """A log-probability and its alternatives as a message."""
    top = [generation_pb2.Alternative(token_id=token, logprob=value) for token, value in item.top]
    return generation_pb2.TokenLogprob(token_id=item.token_id, logprob=item.logprob, top=top)


def fill_score(message: generation_pb2.Score, logprobs: Sequence[TokenLogprob], num_top: int) -> None:
    """Set a continuation's score from its tokens' log-probabilities, each of which has at least one alternative.

    num_top: how many alternatives the client requested.
    """
    message.logprobs.extend(logprob_message(replace(item, top=item.top[:num_top])) for item in logprobs)
    message.total_logprob = math.fsum(item.logprob for item in logprobs)
    message.is_greedy = all(item.top[0][0] == item.token_id for item in logprobs)


def set_adapter(message: _Response, session: Session, request_id: str) -> None:
    """Set the request's id and the adapter that answers."""
    message.request_id = request_id
    if session.adapter is not None:
        message.adapter.id = session.adapter.id
        message.adapter.revision = session.adapter.revision
        message.adapter.methods.extend(session.adapter.methods)


def set_usage(message: _Response, session: Session) -> None:
    """Set the request's token counts and times."""
    message.usage.prompt_tokens = session.num_prompt_tokens
    message.usage.virtual_tokens = session.num_virtual_tokens
    message.usage.cached_tokens = session.num_reused_tokens
    message.usage.generated_tokens = session.num_generated_tokens
    arrival = session.arrival_seconds
    message.timing.queue_seconds = (session.started_seconds or arrival) - arrival
    message.timing.time_to_first_token_seconds = (session.first_token_seconds or arrival) - arrival
    message.timing.total_seconds = (session.last_token_seconds or arrival) - arrival
