"""How tests state a refusal, and wait for its end."""

from collections.abc import Callable

import pytest
from support.live_server import eventually

from quiver import QuiverClientError, ServerBusy


def refusal(call: Callable[[], object], kind: type[QuiverClientError], fragment: str) -> QuiverClientError:
    """The error of a call that must be refused in these words."""
    with pytest.raises(kind) as caught:
        call()
    assert fragment in str(caught.value)
    return caught.value


def has_room_again(call: Callable[[], object]) -> None:
    """Waits until a call is not refused any more: what others have closed is counted for a moment longer."""

    def admitted() -> bool:
        try:
            call()
        except ServerBusy:
            return False
        return True

    eventually(admitted)
