"""One request from admission to its last piece: lease an adapter, run its candidates, turn tokens into text."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from quiver_peft.adapters.banks import BASE_SLOT
from quiver_peft.tokenizer import Tokenizer
from quiver_server.adapter_entry import Resident
from quiver_server.adapter_store import AdapterStore
from quiver_server.admission import Admission
from quiver_server.engine import Delivery, Engine
from quiver_server.errors import BusyError, DrainingError, InvalidRequestError, RequestError
from quiver_server.limits import Limits
from quiver_server.metrics import Metrics
from quiver_server.request import FinishReason, SamplingParams, Sequence, TokenEvent, TokenLogprob
from quiver_server.text_stream import TextStream
from quiver_server.wire import Asked


@dataclass(frozen=True)
class Piece:
    """What one token adds to one candidate."""

    index: int
    text: str
    token_id: int
    logprob: TokenLogprob | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Candidate:
    """One candidate: its sequence in the engine and its text."""

    sequence: Sequence
    text: TextStream
    gone: asyncio.Event  # set once the engine has let go of the sequence
    ended: bool = False
    last_token_seconds: float | None = None

    def push(self, event: TokenEvent) -> Piece:
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
        return Piece(self.sequence.index, text, token, event.logprob, event.prompt_logprobs, reason)


class Session:
    """One admitted request. adapter: None for the base. Times are of the monotonic clock."""

    def __init__(self, asked: Asked, arrival_seconds: float) -> None:
        self.asked = asked
        self.adapter: Resident | None = None
        self.arrival_seconds = arrival_seconds
        self.leased_seconds: float | None = None  # when the adapter was in memory
        self.started_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.last_token_seconds: float | None = None
        self.num_generated_tokens = 0
        self.num_remaining_tokens = 0
        self.num_reused_tokens = 0
        self._end: Callable[[RequestError], None] | None = None

    @property
    def num_virtual_tokens(self) -> int:
        """Rows that the adapter puts before the prompt."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    def ended_by(self, end: Callable[[RequestError], None] | None) -> None:
        """How the adapter may end this request from outside; None: no more."""
        if self.adapter is not None:
            if self._end is not None:
                self.adapter.enders.discard(self._end)
            if end is not None:
                self.adapter.enders.add(end)
        self._end = end

    def note_token(self, candidate: Candidate, metrics: Metrics) -> None:
        """A token of a candidate arrived now; when scoring, a continuation's score."""
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now
            metrics.queue.observe((self.started_seconds or now) - self.arrival_seconds)
            if not self.asked.continuations:
                metrics.time_to_first_token.observe(now - self.arrival_seconds)
        self.last_token_seconds = now
        if self.asked.continuations:
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


class Generator:
    """Admits requests and runs them on the engine. Lives in the event loop.

    start_token_id: what an encoder-decoder's answers begin with, inside; None with a decoder-only base.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        admission: Admission,
        limits: Limits,
        max_queue_seconds: float,
        start_token_id: int | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._admission = admission
        self._limits = limits
        self._max_queue_seconds = max_queue_seconds
        self._start_token_id = start_token_id
        self._closing: set[asyncio.Task[None]] = set()
        self.draining = False

    def open(self, asked: Asked) -> Session:
        """Admit a request, or raise BusyError or DrainingError."""
        if self.draining:
            raise DrainingError("the server is stopping; another replica may answer")
        self._admission.check(asked)
        return Session(asked, time.monotonic())

    async def run(self, session: Session) -> AsyncIterator[Piece]:
        """The pieces of all candidates as they come. Leaving early cancels the rest; the adapter is then given back."""
        asked = session.asked
        self._admission.enter(asked)
        candidates: list[Candidate] = []
        try:
            if asked.adapter_id:
                session.adapter = await self._store.acquire(asked.adapter_id)
                session.leased_seconds = time.monotonic()
                session.note_remaining(asked.params.max_new_tokens * asked.num_candidates)
                self._check_room(session)
            queue: asyncio.Queue[tuple[Candidate, TokenEvent]] = asyncio.Queue()
            candidates += [self._submit(session, index, queue) for index in range(asked.num_candidates)]
            session.ended_by(partial(_end_one, candidates, queue))
            while not all(candidate.ended for candidate in candidates):
                candidate, event = await self._next(queue, session)
                if candidate.ended:
                    continue  # a token drawn while its stop string was being found
                if event.error is not None:
                    raise event.error
                session.note_token(candidate, self._metrics)
                yield candidate.push(event)
                if candidate.ended and not candidate.gone.is_set():
                    self._engine.cancel(candidate.sequence)
        finally:
            # A task of its own: this coroutine may be under cancellation, and the engine must let go first.
            task = asyncio.create_task(self._close(session, candidates))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _next(
        self, queue: "asyncio.Queue[tuple[Candidate, TokenEvent]]", session: Session
    ) -> tuple[Candidate, TokenEvent]:
        """The next event. Raises BusyError for a request that nobody has begun for too long."""
        limit = self._max_queue_seconds
        while session.started_seconds is None:
            remaining = session.arrival_seconds + limit - time.monotonic()
            try:
                async with asyncio.timeout(max(remaining, 0.0)):
                    return await queue.get()
            except TimeoutError:
                if session.started_seconds is None:
                    raise BusyError(f"waited {limit:g} s without starting (--max-queue-seconds)") from None
        return await queue.get()

    def _check_room(self, session: Session) -> None:
        """Virtual tokens take positions too, which is known only now that the adapter is."""
        asked, num_virtual, length = session.asked, session.num_virtual_tokens, self._limits.context_length
        num_prompt = len(asked.prompt)
        if num_virtual + num_prompt + asked.num_following > length:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; with the {num_virtual} virtual tokens of adapter "
                f"{asked.adapter_id!r} and {asked.following} it must fit into the context of {length}",
                "prompt",
            )
        num_prompt_tokens = 0 if session.adapter is None else session.adapter.num_prompt_tokens
        self._limits.check_source_length(num_prompt, num_prompt_tokens, "prompt")

    def _submit(self, session: Session, index: int, queue: "asyncio.Queue[tuple[Candidate, TokenEvent]]") -> Candidate:
        asked = session.asked

        def emit(event: TokenEvent) -> None:
            if event.is_last:
                candidate.gone.set()
            if event.token_id is not None or event.error is not None:
                queue.put_nowait((candidate, event))

        def on_started() -> None:
            if session.started_seconds is None:
                session.started_seconds = time.monotonic()
                session.num_reused_tokens = sequence.num_reused_tokens

        room = self._limits.context_length - session.num_virtual_tokens - len(asked.prompt)
        params = replace(asked.params, max_new_tokens=min(asked.params.max_new_tokens, room))
        sequence = self._sequence(session, params, index, emit)
        sequence.on_started = on_started
        text = TextStream(self._tokenizer, asked.stop_strings, asked.include_stop_string, asked.params.min_new_tokens)
        candidate = Candidate(sequence, text, asyncio.Event())
        self._engine.submit(sequence)
        return candidate

    def _sequence(
        self, session: Session, params: SamplingParams, index: int, emit: Callable[[TokenEvent], None]
    ) -> Sequence:
        """What the engine computes; with an encoder-decoder the prompt is the source."""
        prompt, adapter = session.asked.prompt, session.adapter
        scored = session.asked.continuations[index] if session.asked.continuations else []
        slot, revision = (BASE_SLOT, "") if adapter is None else (adapter.slot, adapter.revision)
        if self._start_token_id is None:
            sequence = Sequence(prompt + scored, params, index, emit, slot, session.num_virtual_tokens)
            sequence.first_logprob = len(prompt) if scored else 1
        else:
            num_prefix = 0 if adapter is None else adapter.num_prefix_tokens
            start = [self._start_token_id, *scored]
            sequence = Sequence(start, params, index, emit, slot, num_prefix, source=prompt)
            sequence.num_virtual_source_tokens = 0 if adapter is None else adapter.num_prompt_tokens
        sequence.revision = revision
        sequence.tenant = "" if adapter is None else adapter.id
        sequence.priority = session.asked.priority
        return sequence

    async def _close(self, session: Session, candidates: Iterable[Candidate]) -> None:
        session.ended_by(None)
        for candidate in candidates:
            if not candidate.gone.is_set():
                self._engine.cancel(candidate.sequence)
                await candidate.gone.wait()
        self._admission.leave(session.asked)
        if session.adapter is not None:
            session.note_remaining(0)
            await self._store.release(session.adapter)

    async def wait_closed(self) -> None:
        """Until every request that ended has given back what it held."""
        while self._closing:
            await asyncio.wait(set(self._closing))


def _end_one(
    candidates: Iterable[Candidate], queue: "asyncio.Queue[tuple[Candidate, TokenEvent]]", error: RequestError
) -> None:
    """Fail a request through one of its candidates that have not ended, if any."""
    for candidate in candidates:
        if not candidate.ended:
            return queue.put_nowait((candidate, TokenEvent(None, error=error)))


def dispatch(events: Delivery) -> None:
    """Hand a step's events to their sequences; called in the event loop, once a step."""
    for sequence, event in events:
        sequence.emit(event)
