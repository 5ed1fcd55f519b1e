"""How tests state a refusal."""

from collections.abc import Callable

import pytest

from quiver import QuiverClientError


def refusal(call: Callable[[], object], kind: type[QuiverClientError], fragment: str) -> QuiverClientError:
    """The error of a call that must be refused in these words."""
    with pytest.raises(kind) as caught:
        call()
    assert fragment in str(caught.value)
    return caught.value
