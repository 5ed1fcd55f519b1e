"""Choices: collects the text, tokens and log-probabilities of a completion's choices, with `echo` if requested."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quiver_peft.tokenizer import Tokenizer
from quiver_server.engine.sequence import FinishReason, TokenLogprob
from quiver_server.requests.detokenizer import IncrementalDetokenizer
from quiver_server.requests.session import Piece, Session


@dataclass(frozen=True)
class Echo:
    """A prompt to repeat. logprobs: of its tokens after the first; None unless requested."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None


@dataclass
class Part:
    """One choice, or one chunk of it.

    offsets: in the choice's text, of each token in `logprobs`. echo: comes before `text`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    offsets: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None
    echo: Echo | None = None


class Choices:
    """All choices of a completion. Choice c of prompt p has the index p * n + c.

    echoed: the prompts to repeat, as the client sent them; empty without `echo`.
    """

    def __init__(self, tokenizer: Tokenizer, session: Session, echoed: Sequence[str | Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._session = session
        self._echoed = echoed
        self.parts = [Part(index) for index in range(session.num_candidates)]
        self._spelling = [IncrementalDetokenizer(tokenizer) for _ in self.parts]
        self._to_echo = {part.index for part in self.parts} if echoed else set[int]()

    def add(self, piece: Piece) -> None:
        """Add a token or a score."""
        part, spelling = self.parts[piece.index], self._spelling[piece.index]
        if piece.index in self._to_echo:
            self._to_echo.remove(piece.index)
            part.echo = self._echo(piece)
            spelling.num_characters = len(part.echo.text)
        part.finish_reason = piece.finish_reason
        if not self._session.is_generation:
            return
        part.text += piece.text
        part.token_ids.append(piece.token_id)
        if piece.logprob is not None:
            part.logprobs.append(piece.logprob)
            part.offsets.append(spelling.num_characters)
            spelling.push(piece.token_id)

    def take(self, index: int) -> Part:
        """What was added to a choice since it was last taken."""
        part, self.parts[index] = self.parts[index], Part(index)
        return part

    def _echo(self, piece: Piece) -> Echo:
        prompt_index = piece.index * len(self._session.requests) // len(self.parts)
        request, sent = self._session.requests[prompt_index], self._echoed[prompt_index]
        text = sent if isinstance(sent, str) else self._tokenizer.decode(sent)
        return Echo(text, request.prompt, piece.prompt_logprobs if request.params.prompt_logprobs else None)
