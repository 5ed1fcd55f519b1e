"""The details of a failed call: written by the server's half, read by the client's half."""

import grpc
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from quiver.status import (
    MAX_MESSAGE_BYTES,
    STATUS_DETAILS_KEY,
    FieldViolation,
    StatusDetails,
    read_status_details,
    shorten,
    status_details,
)

CODE = grpc.StatusCode.INVALID_ARGUMENT
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=25)  # 100 bytes at most


@given(
    violations=st.dictionaries(_TEXT, _TEXT, max_size=6),
    retry_after_milliseconds=st.none() | st.integers(0, 10**9),
    reason=st.from_regex(r"[A-Z][A-Z_]{0,30}", fullmatch=True) | st.just(""),
)
def test_what_is_written_is_read(violations: dict[str, str], retry_after_milliseconds: int | None, reason: str) -> None:
    seconds = None if retry_after_milliseconds is None else retry_after_milliseconds / 1000
    value = status_details(CODE, "message", field_violations=violations, retry_after_seconds=seconds, reason=reason)

    assert read_status_details([("other", "x"), (STATUS_DETAILS_KEY, value)]) == StatusDetails(
        field_violations=tuple(FieldViolation(field, text) for field, text in violations.items()),
        retry_after_seconds=seconds,
        reason=reason,
    )


def test_the_value_is_a_google_rpc_status_as_other_tools_read_it() -> None:
    value = status_details(CODE, "top_p is 2", field_violations={"sampling.top_p": "above 1"}, reason="BAD")

    status = status_pb2.Status.FromString(value)
    bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()

    assert (status.code, status.message) == (3, "top_p is 2")
    assert status.details[0].Unpack(bad_request) and status.details[1].Unpack(info)
    assert bad_request.field_violations[0].field == "sampling.top_p"
    assert (info.reason, info.domain) == ("BAD", "quiver")


def test_nothing_is_read_from_metadata_without_details() -> None:
    assert read_status_details([]) == StatusDetails()
    assert read_status_details([("x-adapter-id", "support")]) == StatusDetails()


@given(st.binary())
def test_no_bytes_break_the_reader(value: bytes) -> None:
    assert isinstance(read_status_details([(STATUS_DETAILS_KEY, value)]), StatusDetails)


def test_a_detail_whose_inside_is_broken_is_ignored() -> None:
    status = status_pb2.Status(code=3)
    detail = status.details.add(type_url="type.googleapis.com/google.rpc.BadRequest")
    detail.value = b"\xff"

    assert read_status_details([(STATUS_DETAILS_KEY, status.SerializeToString())]) == StatusDetails()


def test_long_texts_are_cut_to_what_metadata_can_carry() -> None:
    value = status_details(CODE, "m" * 50_000, field_violations={f"f{i}": "d" * 5_000 for i in range(50)})

    assert len(value) < 4096
    assert status_pb2.Status.FromString(value).message == "m" * (MAX_MESSAGE_BYTES - 3) + "..."


def test_shorten_leaves_short_texts_alone() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abc..."


def test_shorten_counts_bytes_and_cuts_no_character_in_two() -> None:
    assert shorten("ääää", 8) == "ääää"
    assert shorten("äääää", 8) == "ää..."


def test_shorten_mends_what_utf_8_cannot_hold() -> None:
    assert shorten("a\ud800b") == "a?b"
