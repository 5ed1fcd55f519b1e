"""Every gRPC status and the error that the client makes of it, over a real connection."""

import grpc
import pytest
from support.scripted_server import Failure, Script, ScriptedServer

from quiver import AsyncClient, Client, errors
from quiver.status import FieldViolation, shorten, status_details

STATUSES: list[tuple[grpc.StatusCode, type[errors.QuiverClientError]]] = [
    (grpc.StatusCode.CANCELLED, errors.CallCancelled),
    (grpc.StatusCode.ABORTED, errors.CallCancelled),
    (grpc.StatusCode.UNKNOWN, errors.ServerInternal),
    (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
    (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
    (grpc.StatusCode.NOT_FOUND, errors.AdapterNotFound),
    (grpc.StatusCode.ALREADY_EXISTS, errors.ServerInternal),
    (grpc.StatusCode.PERMISSION_DENIED, errors.AccessDenied),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ServerBusy),
    (grpc.StatusCode.FAILED_PRECONDITION, errors.BaseMismatch),
    (grpc.StatusCode.OUT_OF_RANGE, errors.InvalidRequest),
    (grpc.StatusCode.UNIMPLEMENTED, errors.ServerInternal),
    (grpc.StatusCode.INTERNAL, errors.ServerInternal),
    (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable),
    (grpc.StatusCode.DATA_LOSS, errors.ServerInternal),
    (grpc.StatusCode.UNAUTHENTICATED, errors.AccessDenied),
]


def test_the_table_above_holds_every_status() -> None:
    assert {code for code, _ in STATUSES} == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize(("code", "expected"), STATUSES)
def test_each_status_becomes_its_error(
    client: Client, script: Script, code: grpc.StatusCode, expected: type[errors.QuiverClientError]
) -> None:
    script.failure = Failure(code, "because of this")

    with pytest.raises(expected, match="because of this") as caught:
        client.generate("hello")
    assert type(caught.value) is expected
    assert caught.value.code is code
    assert caught.value.reason == ""


@pytest.mark.parametrize(("code", "expected"), STATUSES)
async def test_each_status_becomes_its_error_in_asyncio(
    server: ScriptedServer, code: grpc.StatusCode, expected: type[errors.QuiverClientError]
) -> None:
    server.script.failure = Failure(code, "because of this")

    async with AsyncClient(server.target) as client:
        with pytest.raises(expected, match="because of this") as caught:
            await client.generate("hello")
    assert type(caught.value) is expected


def _violation_failure() -> Failure:
    code = grpc.StatusCode.INVALID_ARGUMENT
    message = "the request is malformed"
    violations = {"sampling.top_p": "1.5 is not in (0, 1]"}
    return Failure(code, message, status_details(code, message, field_violations=violations, reason="BAD"))


def test_field_violations_reach_the_caller(client: Client, script: Script) -> None:
    script.failure = _violation_failure()

    with pytest.raises(errors.InvalidRequest) as caught:
        client.generate("hello")
    assert caught.value.field_violations == (FieldViolation("sampling.top_p", "1.5 is not in (0, 1]"),)
    assert caught.value.reason == "BAD"
    assert str(caught.value) == "the request is malformed; sampling.top_p: 1.5 is not in (0, 1]"


async def test_field_violations_reach_the_caller_in_asyncio(server: ScriptedServer) -> None:
    server.script.failure = _violation_failure()

    async with AsyncClient(server.target) as client:
        with pytest.raises(errors.InvalidRequest) as caught:
            await client.generate("hello")
    assert caught.value.field_violations == (FieldViolation("sampling.top_p", "1.5 is not in (0, 1]"),)


def test_a_violation_that_the_message_says_already_is_not_said_twice(client: Client, script: Script) -> None:
    code, message = grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: 1.5 is not in (0, 1]"
    details = status_details(code, message, field_violations={"sampling.top_p": "1.5 is not in (0, 1]"})
    script.failure = Failure(code, message, details)

    with pytest.raises(errors.InvalidRequest) as caught:
        client.generate("hello")
    assert str(caught.value) == message


def test_a_busy_server_says_when_to_try_again(client: Client, script: Script) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    details = status_details(code, "the queue is full", retry_after_seconds=1.5, reason="BUSY")
    script.failure = Failure(code, "the queue is full", details)

    with pytest.raises(errors.ServerBusy) as caught:
        client.generate("hello")
    assert caught.value.retry_after_seconds == 1.5
    assert caught.value.reason == "BUSY"
    assert str(caught.value) == "the queue is full (try again in 1.5 s)"


def test_a_busy_server_may_say_no_time(client: Client, script: Script) -> None:
    script.failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    with pytest.raises(errors.ServerBusy) as caught:
        client.generate("hello")
    assert caught.value.retry_after_seconds is None


def test_the_longest_details_still_arrive(client: Client, script: Script) -> None:
    code = grpc.StatusCode.INVALID_ARGUMENT
    message = "ü" * 10_000
    violations = {f"field_{i}" + "x" * 10_000: "ü" * 10_000 for i in range(100)}
    details = status_details(code, message, field_violations=violations)
    script.failure = Failure(code, shorten(message), details)

    with pytest.raises(errors.InvalidRequest) as caught:
        client.generate("hello")
    assert caught.value.field_violations[0].field.startswith("field_0")


def test_details_that_are_not_details_are_ignored(client: Client, script: Script) -> None:
    script.failure = Failure(grpc.StatusCode.NOT_FOUND, "no such adapter", b"\xff\xff\xff")

    with pytest.raises(errors.AdapterNotFound, match="no such adapter"):
        client.generate("hello")


def test_a_target_where_nothing_listens_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.ServerUnavailable, match=r"127\.0\.0\.1:1"):
        client.generate("hello")


def test_an_error_keeps_grpcs_own_as_its_cause(client: Client, script: Script) -> None:
    script.failure = Failure(grpc.StatusCode.NOT_FOUND, "no such adapter")

    with pytest.raises(errors.AdapterNotFound) as caught:
        client.generate("hello")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_every_error_is_drawn_in_the_tree() -> None:
    tree = errors.__doc__ or ""

    assert all(error.__name__ in tree for error in errors.QuiverClientError.__subclasses__())
