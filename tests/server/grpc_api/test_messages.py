"""gRPC messages: what the internal types are written as, and where the fields of errors are."""

from quiver.v1 import generation_pb2
from quiver_server.engine.sequence import FinishReason, TokenLogprob
from quiver_server.grpc_api.messages import FINISH_REASONS, logprob_message
from quiver_server.grpc_api.requests import GENERATION_FIELDS, SCORING_FIELDS


def test_every_finish_reason_has_its_own_value() -> None:
    assert set(FINISH_REASONS) == set(FinishReason)
    assert len(set(FINISH_REASONS.values())) == len(FinishReason)


def test_logprob_message() -> None:
    message = logprob_message(TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.5))))
    assert (message.token_id, message.logprob) == (7, -0.5)
    assert [(other.token_id, other.logprob) for other in message.top] == [(7, -0.5), (9, -1.5)]


def test_field_names_are_paths_in_the_messages() -> None:
    for message, names in (
        (generation_pb2.GenerateRequest(), GENERATION_FIELDS),
        (generation_pb2.ScoreRequest(), SCORING_FIELDS),
    ):
        for path in names.values():
            part, _, name = path.partition(".")
            assert name in getattr(message, part).DESCRIPTOR.fields_by_name
