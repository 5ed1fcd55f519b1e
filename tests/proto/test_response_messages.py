"""From response messages to dataclasses: no field is lost, whatever the server sent."""

from dataclasses import asdict, fields
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from quiver import response_messages, results
from quiver.results import AdapterState, FinishReason
from quiver.v1 import adapters_pb2, generation_pb2, model_pb2

_Message = TypeVar("_Message", bound=Message)

PAIRS: list[tuple[type[Message], type[Any]]] = [
    (generation_pb2.GenerateResponse, results.Generation),
    (generation_pb2.GenerateStreamResponse, results.Piece),
    (generation_pb2.Candidate, results.Candidate),
    (generation_pb2.TokenLogprob, results.TokenLogprob),
    (generation_pb2.Alternative, results.Alternative),
    (generation_pb2.Usage, results.Usage),
    (generation_pb2.AdapterRef, results.AdapterRef),
    (generation_pb2.Timing, results.Timing),
    (generation_pb2.TokenizeResponse, results.Tokens),
    (adapters_pb2.Adapter, results.Adapter),
    (model_pb2.GetModelResponse, results.Model),
]


@pytest.mark.parametrize(("message", "result"), PAIRS)
def test_a_dataclass_has_the_fields_of_its_message(message: type[Message], result: type[Any]) -> None:
    assert {field.name for field in fields(result)} == {field.name for field in message.DESCRIPTOR.fields}


def _logprob(token_id: int) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token_id=token_id,
        logprob=-0.5,
        top=[generation_pb2.Alternative(token_id=token_id + 1, logprob=-0.25)],
    )


def _logprob_result(token_id: int) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": -0.5, "top": ({"token_id": token_id + 1, "logprob": -0.25},)}


USAGE = {"prompt_tokens": 1, "generated_tokens": 2, "cached_tokens": 3, "virtual_tokens": 4}
TIMING = {"queue_seconds": 0.1, "time_to_first_token_seconds": 0.2, "total_seconds": 0.3}
ADAPTER_REF = {"id": "support", "revision": "abc", "methods": ("lora", "ia3")}


def test_a_full_answer_is_read_whole() -> None:
    message = generation_pb2.GenerateResponse(
        candidates=[
            generation_pb2.Candidate(
                index=1,
                text="hi",
                token_ids=[5, 6],
                logprobs=[_logprob(5)],
                finish_reason=generation_pb2.FINISH_REASON_STOP_STRING,
                prompt_logprobs=[_logprob(9)],
            )
        ],
        usage=generation_pb2.Usage(**USAGE),
        adapter=generation_pb2.AdapterRef(id="support", revision="abc", methods=["lora", "ia3"]),
        request_id="r-1",
        timing=generation_pb2.Timing(**TIMING),
    )

    assert asdict(response_messages.generation(_over_the_wire(message))) == {
        "candidates": (
            {
                "index": 1,
                "text": "hi",
                "token_ids": (5, 6),
                "logprobs": (_logprob_result(5),),
                "finish_reason": "stop_string",
                "prompt_logprobs": (_logprob_result(9),),
            },
        ),
        "usage": USAGE,
        "adapter": ADAPTER_REF,
        "request_id": "r-1",
        "timing": TIMING,
    }


def test_a_full_piece_is_read_whole() -> None:
    message = generation_pb2.GenerateStreamResponse(
        index=2,
        text="hi",
        token_ids=[5],
        logprobs=[_logprob(5)],
        finish_reason=generation_pb2.FINISH_REASON_LENGTH,
        usage=generation_pb2.Usage(**USAGE),
        adapter=generation_pb2.AdapterRef(id="support", revision="abc", methods=["lora", "ia3"]),
        request_id="r-1",
        timing=generation_pb2.Timing(**TIMING),
        prompt_logprobs=[_logprob(9)],
    )

    assert asdict(response_messages.piece(_over_the_wire(message))) == {
        "index": 2,
        "text": "hi",
        "token_ids": (5,),
        "logprobs": (_logprob_result(5),),
        "finish_reason": "length",
        "adapter": ADAPTER_REF,
        "request_id": "r-1",
        "prompt_logprobs": (_logprob_result(9),),
        "usage": USAGE,
        "timing": TIMING,
    }


def test_an_adapter_is_read_whole() -> None:
    expected: dict[str, Any] = {
        "id": "support",
        "revision": "abc",
        "methods": ("lora",),
        "source": "store/support",
        "state": "failed",
        "device_bytes": 10,
        "host_bytes": 20,
        "pinned": True,
        "running": 3,
        "waiting": 4,
        "failure_reason": "truncated file",
        "base_fingerprint": "f00d",
        "rank": 8,
        "virtual_tokens": 20,
        "parameters": 1000,
        "description": "lora rank 8",
        "disk_bytes": 30,
        "aliases": ({"name": "live", "adapter_id": "support", "revision": "abc"},),
        "revisions": (
            {
                "revision": "abc",
                "state": "resident",
                "running": 2,
                "device_bytes": 5,
                "host_bytes": 6,
                "disk_bytes": 7,
                "pinned": True,
            },
        ),
    }
    revision: dict[str, Any] = expected["revisions"][0] | {"state": adapters_pb2.Adapter.STATE_RESIDENT}
    values: dict[str, Any] = expected | {
        "state": adapters_pb2.Adapter.STATE_FAILED,
        "revisions": [adapters_pb2.Revision(**revision)],
    }
    message = adapters_pb2.Adapter(**values)

    assert asdict(response_messages.adapter(_over_the_wire(message))) == expected


def test_a_model_is_read_whole() -> None:
    expected: dict[str, Any] = {
        "name": "demo",
        "architecture": "llama",
        "vocab_size": 1,
        "context_length": 2,
        "dtype": "float32",
        "device": "cpu",
        "fingerprint": "f00d",
        "parameters": 3,
        "kv_capacity_tokens": 4,
        "adapter_methods": ("lora", "ia3"),
        "server_version": "0.1.0",
        "default_max_new_tokens": 5,
    }
    message = model_pb2.GetModelResponse(**expected)

    assert asdict(response_messages.model(_over_the_wire(message))) == expected


def test_what_a_piece_leaves_out_is_none() -> None:
    piece = response_messages.piece(generation_pb2.GenerateStreamResponse(text="x"))

    assert (piece.finish_reason, piece.usage, piece.adapter, piece.timing) == (None, None, None, None)


def test_every_finish_reason_has_its_name() -> None:
    for name, number in generation_pb2.FinishReason.items():
        candidate = generation_pb2.Candidate(finish_reason=number)
        result = response_messages.generation(generation_pb2.GenerateResponse(candidates=[candidate]))
        assert f"FINISH_REASON_{result.finish_reason.name}" == name


def test_every_adapter_state_has_its_name() -> None:
    for name, number in adapters_pb2.Adapter.State.items():
        assert f"STATE_{response_messages.adapter(adapters_pb2.Adapter(state=number)).state.name}" == name


def test_what_a_newer_server_says_is_unspecified_and_not_an_error() -> None:
    newer: Any = 99

    piece = response_messages.piece(generation_pb2.GenerateStreamResponse(finish_reason=newer))
    adapter = response_messages.adapter(adapters_pb2.Adapter(state=newer))

    assert piece.finish_reason is FinishReason.UNSPECIFIED
    assert adapter.state is AdapterState.UNSPECIFIED


def _over_the_wire(message: _Message) -> _Message:
    return type(message).FromString(message.SerializeToString())
