"""Incremental detokenization: whole characters only, and stop strings found across token boundaries."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from quiver_peft.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class IncrementalDetokenizer:
    """Decodes token ids one by one. num_characters: of the text so far."""

    tokenizer: Tokenizer
    num_characters: int = 0
    _ids: list[int] = field(default_factory=list[int])
    _window: int = 0  # ids from here on are decoded together: a token's text may depend on its neighbors
    _num_read: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is complete now, without half a character."""
        self._ids.append(token_id)
        before = self.tokenizer.decode(self._ids[self._window : self._num_read])
        now = self.tokenizer.decode(self._ids[self._window :])
        if now.endswith(_INCOMPLETE) or len(now) <= len(before):
            return ""
        self._window, self._num_read = self._num_read, len(self._ids)
        self.num_characters += len(now) - len(before)
        return now[len(before) :]

    def finish(self) -> str:
        """Returns the incomplete rest, after the last token."""
        rest = self.tokenizer.decode(self._ids[self._window :])
        rest = rest[len(self.tokenizer.decode(self._ids[self._window : self._num_read])) :]
        self._num_read = len(self._ids)
        self.num_characters += len(rest)
        return rest


def token_offsets(tokenizer: Tokenizer, ids: Seq[int]) -> list[int]:
    """The character offset of each token in the text of all of them. A token within a character has its offset."""
    spelling, offsets = IncrementalDetokenizer(tokenizer), list[int]()
    for token_id in ids:
        offsets.append(spelling.num_characters)
        spelling.push(token_id)
    return offsets


@dataclass
class TextStream:
    """The growing text of one candidate.

    text: the part that can be sent so far. stopped: whether a stop string was found; `text` is then final.
    """

    tokenizer: Tokenizer
    stop_strings: Seq[str] = ()
    include_stop_string: bool = False
    min_new_tokens: int = 0
    text: str = ""
    stopped: bool = False
    _decoded: str = ""

    def __post_init__(self) -> None:
        self._spelling = IncrementalDetokenizer(self.tokenizer)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that can be sent now, without the start of a stop string."""
        self._decoded += self._spelling.push(token_id)
        return self._emit(final=False)

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        self._decoded += self._spelling.finish()
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        """Moves what can be sent from `_decoded` to `text`."""
        if self.stopped:
            return ""
        end = len(self._decoded)
        looking = self._spelling.num_tokens >= self.min_new_tokens
        if looking and (found := self._find_stop()) is not None:
            end, self.stopped = found, True
        elif not final:
            end -= self._held_suffix()
        shown = self._decoded[len(self.text) : end]
        self.text += shown
        return shown

    def _find_stop(self) -> int | None:
        """Where the first stop string ends the text, or None."""
        found = [
            (start, start + len(stop) if self.include_stop_string else start)
            for stop in self.stop_strings
            if (start := self._decoded.find(stop, max(len(self.text) - len(stop) + 1, 0))) >= 0
        ]
        return min(found)[1] if found else None

    def _held_suffix(self) -> int:
        """The length of the longest suffix that could be the start of a stop string."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        for length in range(min(longest, len(self._decoded) - len(self.text)), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self.stop_strings):
                return length
        return 0
