"""From token ids to text, piece by piece: whole characters only, and stop strings found wherever tokens split them."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from quiver_peft.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class TextStream:
    """The text of one candidate as it grows.

    text: what may be shown so far. stopped: whether a stop string was found; `text` is then final.
    """

    tokenizer: Tokenizer
    stop_strings: Seq[str] = ()
    include_stop_string: bool = False
    min_new_tokens: int = 0
    text: str = ""
    stopped: bool = False
    _ids: list[int] = field(default_factory=list[int])
    _decoded: str = ""  # text of _ids[:_num_read], whole characters only
    _window: int = 0  # ids from here on are decoded together, because a token's text may depend on its neighbours
    _num_read: int = 0

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that may now be shown: not half a character, not the start of a stop."""
        self._ids.append(token_id)
        before = self.tokenizer.decode(self._ids[self._window : self._num_read])
        now = self.tokenizer.decode(self._ids[self._window :])
        if not now.endswith(_INCOMPLETE) and len(now) > len(before):
            self._decoded += now[len(before) :]
            self._window, self._num_read = self._num_read, len(self._ids)
        return self._show(final=False)

    def finish(self) -> str:
        """No token follows; returns the text that was held back."""
        rest = self.tokenizer.decode(self._ids[self._window :])
        self._decoded += rest[len(self.tokenizer.decode(self._ids[self._window : self._num_read])) :]
        self._num_read = len(self._ids)
        return self._show(final=True)

    def _show(self, *, final: bool) -> str:
        """Move what is safe from `_decoded` to `text`."""
        if self.stopped:
            return ""
        end = len(self._decoded)
        looking = len(self._ids) >= self.min_new_tokens
        if looking and (found := self._find_stop()) is not None:
            end, self.stopped = found, True
        elif not final:
            end -= self._held_back()
        shown = self._decoded[len(self.text) : end]
        self.text += shown
        return shown

    def _find_stop(self) -> int | None:
        """Where the text ends because of the first stop string in it, or None."""
        found = [
            (start, start + len(stop) if self.include_stop_string else start)
            for stop in self.stop_strings
            if (start := self._decoded.find(stop, max(len(self.text) - len(stop) + 1, 0))) >= 0
        ]
        return min(found)[1] if found else None

    def _held_back(self) -> int:
        """The length of the longest end of the text that a stop string could begin with."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        for length in range(min(longest, len(self._decoded) - len(self.text)), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self.stop_strings):
                return length
        return 0
