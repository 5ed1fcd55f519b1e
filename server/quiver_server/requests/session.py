"""Session: one admitted request while it runs, with its adapter, its candidates and timestamps."""

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
    """What one token adds to one candidate. index: of the candidate, counted over all prompts."""

    index: int
    text: str
    token_id: int
    logprob: TokenLogprob | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Candidate:
    """One candidate: its sequence in the engine and its text. number: counted over all prompts, from 0."""

    number: int
    sequence: Sequence
    text: TextStream
    released: asyncio.Event  # set when the engine has released the sequence
    ended: bool = False
    last_token_seconds: float | None = None

    def on_event(self, event: TokenEvent) -> Piece:
        """The event's piece. Sets `ended` with the last one."""
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

    requests: one for each prompt, all for one adapter. Candidate c of prompt p has the number p * n + c.
    """

    def __init__(self, requests: tuple[PromptRequest, ...], arrival_seconds: float) -> None:
        self.requests = requests
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
        """As the client sent it."""
        return self.requests[0].adapter_id

    @property
    def fairness_key(self) -> str:
        """The adapter's id without a revision; "" for the base."""
        return self.requests[0].fairness_key

    @property
    def is_generation(self) -> bool:
        """Whether it generates; otherwise it scores."""
        return self.requests[0].is_generation

    @property
    def num_candidates(self) -> int:
        return sum(request.num_candidates for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens, each prompt once; continuations of a scoring request do not count."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_sent_tokens(self) -> int:
        """Tokens that the client sent: the prompts and each continuation."""
        scored = sum(len(tokens) for request in self.requests for tokens in request.continuations)
        return self.num_prompt_tokens + scored

    @property
    def num_virtual_tokens(self) -> int:
        """The adapter's rows before the prompt."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    def set_cancel_callback(self, end: Callable[[RequestError], None] | None) -> None:
        """Let the adapter fail this request when it is unloaded; None takes the callback away."""
        if self.adapter is not None:
            if self._end is not None:
                self.adapter.cancel_callbacks.discard(self._end)
            if end is not None:
                self.adapter.cancel_callbacks.add(end)
        self._end = end

    def note_started(self, prompt: int, num_reused_tokens: int) -> None:
        """A candidate runs. Only the first one of each prompt counts its cached tokens. In the engine's thread."""
        if self.started_seconds is None:
            self.started_seconds = time.monotonic()
        if prompt not in self._started_prompts:
            self._started_prompts.add(prompt)
            self.num_reused_tokens += num_reused_tokens

    def note_token(self, candidate: Candidate, metrics: Metrics) -> None:
        """Updates times and metrics for a candidate's token, or for a score, that arrived now."""
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
        """How many tokens may still be generated: an estimate of how long the adapter is needed."""
        if self.adapter is not None:
            self.adapter.num_remaining_tokens += num_tokens - self.num_remaining_tokens
        self.num_remaining_tokens = num_tokens
