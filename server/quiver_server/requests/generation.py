"""One request from admission to its last piece: lease an adapter, run its candidates, turn tokens into text."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from functools import partial

from quiver_peft.adapters.serving.banks import BASE_SLOT
from quiver_peft.tokenizer import Tokenizer
from quiver_server.adapters.entry import LoadedRevision
from quiver_server.adapters.manager import AdapterManager
from quiver_server.engine.engine import Delivery, Engine
from quiver_server.engine.sequence import SamplingParams, Sequence, TokenEvent
from quiver_server.errors import BusyError, DrainingError, InvalidRequestError, RequestError
from quiver_server.requests.admission import Admission
from quiver_server.requests.detokenizer import TextStream
from quiver_server.requests.limits import Limits
from quiver_server.requests.prompt_request import PromptRequest, prompt_error_context
from quiver_server.requests.session import Candidate, Piece, Session
from quiver_server.telemetry.metrics import Metrics

_Queue = asyncio.Queue[tuple[Candidate, TokenEvent]]


class RequestRunner:
    """Admits requests and runs them on the engine. Lives in the event loop.

    start_token_id: what an encoder-decoder's answers begin with, inside; None with a decoder-only base.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterManager,
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

    def admit(self, asked: tuple[PromptRequest, ...]) -> Session:
        """Admit a request of one prompt or several, or raise BusyError, InvalidRequestError or DrainingError."""
        if self.draining:
            raise DrainingError("the server is stopping; another replica may answer")
        session = Session(asked, time.monotonic())
        self.check_capacity(session.fairness_key, session.num_candidates)
        return session

    def check_capacity(self, tenant: str, num_candidates: int) -> None:
        """Raises BusyError or InvalidRequestError where there is no place for so many sequences of one adapter."""
        self._admission.check(tenant, num_candidates)

    async def run(self, session: Session) -> AsyncIterator[Piece]:
        """The pieces of all candidates as they come. Leaving early cancels the rest; the adapter is then given back."""
        self._admission.acquire(session.fairness_key, session.num_candidates)
        candidates: list[Candidate] = []
        try:
            if session.adapter_id:
                await self._lease(session)
            queue: _Queue = asyncio.Queue()
            for prompt, asked in enumerate(session.asked):
                for index in range(asked.num_candidates):
                    candidates.append(self._submit(session, prompt, index, len(candidates), queue))
            session.set_cancel_callback(partial(_fail_request, candidates, queue))
            while not all(candidate.ended for candidate in candidates):
                candidate, event = await self._next(queue, session)
                if candidate.ended:
                    continue  # a token drawn while its stop string was being found
                if event.error is not None:
                    raise event.error
                session.note_token(candidate, self._metrics)
                yield candidate.on_event(event)
                if candidate.ended and not candidate.released.is_set():
                    self._engine.cancel(candidate.sequence)
        finally:
            # A task of its own: this coroutine may be under cancellation, and the engine must let go first.
            task = asyncio.create_task(self._close(session, candidates))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _next(self, queue: _Queue, session: Session) -> tuple[Candidate, TokenEvent]:
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

    async def _lease(self, session: Session) -> None:
        """Hold the adapter. Raises RequestError, also for a prompt that does not fit beside it."""
        session.adapter = await self._store.acquire(session.adapter_id)
        session.leased_seconds = time.monotonic()
        session.note_remaining(sum(asked.params.max_new_tokens * asked.num_candidates for asked in session.asked))
        for i, asked in enumerate(session.asked):
            with prompt_error_context(i, len(session.asked)):
                self._check_context_length(asked, session.adapter)

    def _check_context_length(self, asked: PromptRequest, adapter: LoadedRevision) -> None:
        """Virtual tokens take positions too, which is known only now that the adapter is."""
        num_prompt, num_virtual, length = len(asked.prompt), adapter.num_virtual_tokens, self._limits.context_length
        if num_virtual + num_prompt + asked.max_output_tokens > length:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; with the {num_virtual} virtual tokens of adapter "
                f"{asked.adapter_id!r} and {asked.describe_output} it must fit into the context of {length}",
                "prompt",
            )
        self._limits.check_source_length(num_prompt, adapter.num_prompt_tokens, "prompt")

    def _submit(self, session: Session, prompt: int, index: int, number: int, queue: _Queue) -> Candidate:
        """Candidate `index` of a prompt, `number` among all, enters the engine."""
        asked = session.asked[prompt]

        def emit(event: TokenEvent) -> None:
            if event.is_last:
                candidate.released.set()
            if event.token_id is not None or event.error is not None:
                queue.put_nowait((candidate, event))

        room = self._limits.context_length - session.num_virtual_tokens - len(asked.prompt)
        params = replace(asked.params, max_new_tokens=min(asked.params.max_new_tokens, room))
        sequence = self._sequence(session, asked, params, index, emit)
        sequence.on_first_scheduled = lambda: session.note_started(prompt, sequence.num_reused_tokens)
        text = TextStream(self._tokenizer, asked.stop_strings, asked.include_stop_string, asked.params.min_new_tokens)
        candidate = Candidate(number, sequence, text, asyncio.Event())
        self._engine.submit(sequence)
        return candidate

    def _sequence(
        self,
        session: Session,
        asked: PromptRequest,
        params: SamplingParams,
        index: int,
        emit: Callable[[TokenEvent], None],
    ) -> Sequence:
        """What the engine computes; with an encoder-decoder the prompt is the source."""
        prompt, adapter = asked.prompt, session.adapter
        scored = asked.continuations[index] if asked.continuations else []
        slot, revision = (BASE_SLOT, "") if adapter is None else (adapter.slot, adapter.revision)
        if self._start_token_id is None:
            sequence = Sequence(prompt + scored, params, index, emit, slot, session.num_virtual_tokens)
            sequence.first_logprob = len(prompt) if scored else 1
        else:
            num_prefix = 0 if adapter is None else adapter.num_prefix_tokens
            start = [self._start_token_id, *scored]
            sequence = Sequence(start, params, index, emit, slot, num_prefix, encoder_input=prompt)
            sequence.num_virtual_encoder_tokens = 0 if adapter is None else adapter.num_prompt_tokens
        sequence.revision = revision
        sequence.fairness_key = "" if adapter is None else adapter.id
        sequence.priority = asked.priority
        return sequence

    async def _close(self, session: Session, candidates: Iterable[Candidate]) -> None:
        session.set_cancel_callback(None)
        for candidate in candidates:
            if not candidate.released.is_set():
                self._engine.cancel(candidate.sequence)
                await candidate.released.wait()
        self._admission.release(session.fairness_key, session.num_candidates)
        if session.adapter is not None:
            session.note_remaining(0)
            await self._store.release(session.adapter)

    async def wait_closed(self) -> None:
        """Until every request that ended has given back what it held."""
        while self._closing:
            await asyncio.wait(set(self._closing))


def _fail_request(candidates: Iterable[Candidate], queue: _Queue, error: RequestError) -> None:
    """Fail a request through one of its candidates that have not ended, if any."""
    for candidate in candidates:
        if not candidate.ended:
            return queue.put_nowait((candidate, TokenEvent(None, error=error)))


def dispatch(events: Delivery) -> None:
    """Hand a step's events to their sequences; called in the event loop, once a step."""
    for sequence, event in events:
        sequence.emit(event)
