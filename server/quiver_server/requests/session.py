"""One admitted request while it runs: its prompts, the adapter it holds, its candidates, and when what happened."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from quiver_server.adapters.entry import LoadedRevision
from quiver_server.engine.sequence import FinishReason, Sequence, TokenEvent, TokenLogprob
from quiver_server.errors import RequestError
from quiver_server.requests.detokenizer import TextStream
from quiver_server.requests.prompt_request import PromptRequest
from quiver_server.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Piece:
    """What one token adds to one candidate. index: which, counted over all prompts."""

    index: int
    text: str
    token_id: int
    logprob: TokenLogprob | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Candidate:
    """One candidate: its sequence in the engine and its text. number: among all of the request's, 0 ... ."""

    number: int
    sequence: Sequence
    text: TextStream
    released: asyncio.Event  # set once the engine has let go of the sequence
    ended: bool = False
    last_token_seconds: float | None = None

    def on_event(self, event: TokenEvent) -> Piece:
        """The piece that an event makes; `ended` afterwards tells whether it was the last."""
        token = event.token_id
        assert token is not None
        reason = event.finish_reason
        text = "" if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN) else self.text.push(token)
        if reason is not None and not self.text.stopped:
            text += self.text.finish()
        if self.text.stopped:
            reason = FinishReason.STOP_STRING
        self.ended = reason is not None
        return Piece(self.number, text, token, event.logprob, event.prompt_logprobs, reason)


class Session:
    """One admitted request. adapter: None for the base. Times are of the monotonic clock.

    asked: one for each prompt, all of one adapter. Candidate c of prompt p is number p * n + c.
    """

    def __init__(self, prompts: tuple[PromptRequest, ...], arrival_seconds: float) -> None:
        self.asked = prompts
        self.adapter: LoadedRevision | None = None
        self.arrival_seconds = arrival_seconds
        self.leased_seconds: float | None = None  # when the adapter was in memory
        self.started_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.last_token_seconds: float | None = None
        self.num_generated_tokens = 0
        self.num_remaining_tokens = 0
        self.num_reused_tokens = 0
        self._started_prompts: set[int] = set()
        self._end: Callable[[RequestError], None] | None = None

    @property
    def adapter_id(self) -> str:
        """As it was asked for."""
        return self.asked[0].adapter_id

    @property
    def fairness_key(self) -> str:
        """Whose places it takes."""
        return self.asked[0].fairness_key

    @property
    def is_generation(self) -> bool:
        """Whether it generates; otherwise it scores."""
        return self.asked[0].is_generation

    @property
    def num_candidates(self) -> int:
        """Of all prompts."""
        return sum(asked.num_candidates for asked in self.asked)

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt's counted once; what continues it, when scoring, is none of it."""
        return sum(len(asked.prompt) for asked in self.asked)

    @property
    def num_sent_tokens(self) -> int:
        """Tokens that were sent: the prompts, and each continuation."""
        return self.num_prompt_tokens + sum(len(tokens) for asked in self.asked for tokens in asked.continuations)

    @property
    def num_virtual_tokens(self) -> int:
        """Rows that the adapter puts before the prompt."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    def set_cancel_callback(self, end: Callable[[RequestError], None] | None) -> None:
        """How the adapter may end this request from outside; None: no more."""
        if self.adapter is not None:
            if self._end is not None:
                self.adapter.cancel_callbacks.discard(self._end)
            if end is not None:
                self.adapter.cancel_callbacks.add(end)
        self._end = end

    def note_started(self, prompt: int, num_reused_tokens: int) -> None:
        """A candidate runs; what the first one of its prompt found in the cache counts. In the engine's thread."""
        if self.started_seconds is None:
            self.started_seconds = time.monotonic()
        if prompt not in self._started_prompts:
            self._started_prompts.add(prompt)
            self.num_reused_tokens += num_reused_tokens

    def note_token(self, candidate: Candidate, metrics: Metrics) -> None:
        """A token of a candidate arrived now; when scoring, a continuation's score."""
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now
            metrics.queue.observe((self.started_seconds or now) - self.arrival_seconds)
            if self.is_generation:
                metrics.time_to_first_token.observe(now - self.arrival_seconds)
        self.last_token_seconds = now
        if not self.is_generation:
            return
        if candidate.last_token_seconds is not None:
            metrics.inter_token.observe(now - candidate.last_token_seconds)
        candidate.last_token_seconds = now
        self.num_generated_tokens += 1
        self.note_remaining(self.num_remaining_tokens - 1)

    def note_remaining(self, num_tokens: int) -> None:
        """So many tokens may still be generated, which is how long the adapter may be needed."""
        if self.adapter is not None:
            self.adapter.num_remaining_tokens += num_tokens - self.num_remaining_tokens
        self.num_remaining_tokens = num_tokens
