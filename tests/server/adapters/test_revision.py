"""Names of adapters: what "id@revision" may look like, and that the contract says the same."""

import re
from pathlib import Path

import pytest

from quiver_server.adapters.revision import MIN_REVISION_DIGITS, parse_name
from quiver_server.errors import InvalidRequestError

CONTRACT = Path(__file__).parents[3] / "proto" / "quiver" / "v1" / "generation.proto"


def test_revision_may_be_shortened_to_the_fewest_digits() -> None:
    digits = "0123456789abcdef"[:MIN_REVISION_DIGITS]
    assert parse_name(f"support@{digits}") == ("support", digits)
    with pytest.raises(InvalidRequestError, match=f"{MIN_REVISION_DIGITS} to 64 hexadecimal digits"):
        parse_name(f"support@{digits[:-1]}")


def test_contract_names_the_fewest_digits() -> None:
    text = re.sub(r"\s+(//)?\s*", " ", CONTRACT.read_text("utf-8"))
    assert re.findall(r"shortened to (\d+) or more leading", text) == [str(MIN_REVISION_DIGITS)]
