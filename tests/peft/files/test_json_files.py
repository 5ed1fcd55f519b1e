"""JSON of users: an object, or an error that names the text and the rule."""

from pathlib import Path

import pytest

from quiver_peft.files.json_files import MAX_DEPTH, JsonError, parse_json, read_json


def nested(depth: int) -> str:
    """An object whose value is nested so deep, itself included."""
    return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_objects_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": [1, {"b": null}]}', "utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1, {"b": None}]}
    assert parse_json(nested(MAX_DEPTH), "deep")["a"]
    many = "{" + ", ".join(f'"{i}": [[]]' for i in range(MAX_DEPTH)) + "}"
    assert len(parse_json(many, "wide")) == MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"\xff\xfe\x00", "not valid JSON: "),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: "),
        (b"[]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b"[" * 100_000, "not valid JSON: nested deeper than 100 levels"),
        (nested(100_000).encode(), "not valid JSON: nested deeper than 100 levels"),
        *((nested(depth).encode(), "not valid JSON: nested deeper than 100 levels") for depth in (101, 500, 900, 990)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_whatever_else_is_an_error(text: bytes, rule: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text, "a.json")
    assert str(caught.value).startswith(f"a.json: {rule}")
    assert f"a.json: {caught.value.rule}" == str(caught.value)
