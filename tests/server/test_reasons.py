"""The reasons that the client's documentation names are reasons that the server sends."""

import re
from collections.abc import Iterator
from pathlib import Path

from quiver_server.errors import RequestError

CLIENT = Path(__file__).parents[2] / "proto" / "quiver"


def _kinds(error: type[RequestError]) -> Iterator[type[RequestError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)


def test_documented_reasons_are_sent() -> None:
    sent = {kind.reason for kind in _kinds(RequestError)}
    for name in ("errors.py", "status.py"):
        documented = re.findall(r'such as "([A-Z_]+)"', (CLIENT / name).read_text("utf-8"))
        assert documented and set(documented) <= sent, name
