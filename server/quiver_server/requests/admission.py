"""How many sequences may run or wait at once: in all, and of one adapter. Who finds no place is refused at once."""

from collections import Counter

from quiver_server.errors import BusyError, InvalidRequestError


class Admission:
    """Counts what is inside. Lives in the event loop.

    max_open: sequences that may run or wait. max_share: of these, what one adapter (or the base) may take, so that no
    flood of requests for it keeps others out.
    """

    def __init__(self, max_open: int, max_share: float) -> None:
        self._max_open = max_open
        self._max_open_of_one = max(int(max_open * max_share), 1)
        self._num_open_of: Counter[str] = Counter()  # by adapter id

    def check(self, tenant: str, num_sequences: int) -> None:
        """Raises BusyError where there is no place for a request now, InvalidRequestError where there never is."""
        if num_sequences > self._max_open_of_one:
            raise InvalidRequestError(
                f"the request asks for {num_sequences} sequences at once; this server holds {self._max_open_of_one} of "
                "one adapter (--max-waiting, --max-adapter-share): send several requests"
            )
        num_open = self._num_open_of.total()
        if num_open + num_sequences > self._max_open:
            raise BusyError(
                f"{num_open} sequences are running or waiting, which is all this server holds; try again shortly"
            )
        num_own = self._num_open_of[tenant]
        if num_own + num_sequences > self._max_open_of_one:
            who = f"adapter {tenant!r}" if tenant else "the base"
            raise BusyError(
                f"{who} has {num_own} sequences running or waiting and is asked for {num_sequences} more; its "
                f"share of this server is {self._max_open_of_one} (--max-adapter-share)"
            )

    def acquire(self, tenant: str, num_sequences: int) -> None:
        """A request takes its places."""
        self._num_open_of[tenant] += num_sequences

    def release(self, tenant: str, num_sequences: int) -> None:
        """It gives them back; ids that nobody has leave nothing behind."""
        self._num_open_of[tenant] -= num_sequences
        if not self._num_open_of[tenant]:
            del self._num_open_of[tenant]
