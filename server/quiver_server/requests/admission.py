"""Admission control: bounds the sequences that run or wait, in all and for each adapter. Refuses at once."""

from collections import Counter

from quiver_server.errors import BusyError, InvalidRequestError


class Admission:
    """Counts the sequences that run or wait. Lives in the event loop.

    max_open: the most in all. max_share: the part of these that one adapter (or the base) may take, so that a flood of
    requests for one adapter leaves room for the other adapters.
    """

    def __init__(self, max_open: int, max_share: float) -> None:
        self._max_open = max_open
        self._max_open_of_one = max(int(max_open * max_share), 1)
        self._num_open_of: Counter[str] = Counter()  # by adapter id

    def check(self, fairness_key: str, num_sequences: int) -> None:
        """Raises BusyError when there is no room now, InvalidRequestError when there can never be."""
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
        num_own = self._num_open_of[fairness_key]
        if num_own + num_sequences > self._max_open_of_one:
            who = f"adapter {fairness_key!r}" if fairness_key else "the base"
            raise BusyError(
                f"{who} has {num_own} sequences running or waiting and is asked for {num_sequences} more; its "
                f"share of this server is {self._max_open_of_one} (--max-adapter-share)"
            )

    def acquire(self, fairness_key: str, num_sequences: int) -> None:
        self._num_open_of[fairness_key] += num_sequences

    def release(self, fairness_key: str, num_sequences: int) -> None:
        self._num_open_of[fairness_key] -= num_sequences
        if not self._num_open_of[fairness_key]:  # ids that no adapter has must not pile up
            del self._num_open_of[fairness_key]
