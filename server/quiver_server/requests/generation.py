"""Request runner: admits a request, leases its adapter, runs its candidates on the engine, detokenizes."""

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
from quiver_server.engine.sequence import Sequence, TokenEvent
from quiver_server.errors import BusyError, DrainingError, InvalidRequestError, RequestError
from quiver_server.requests.admission import Admission
from quiver_server.requests.detokenizer import TextStream
from quiver_server.requests.limits import Limits
from quiver_server.requests.prompt_request import PromptRequest, add_prompt_index
from quiver_server.requests.session import Candidate, Piece, Session
from quiver_server.telemetry.metrics import Metrics

_Queue = asyncio.Queue[tuple[Candidate, TokenEvent]]


class RequestRunner:
    """Admits requests and runs them on the engine. Lives in the event loop.

    start_token_id: the decoder's first token with an encoder-decoder; None with a decoder-only base.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterManager,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        admission: Admission,
        limits: Limits,
        max_queue_seconds: float,
        start_token_id: int | None = None,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._admission = admission
        self._limits = limits
        self._max_queue_seconds = max_queue_seconds
        self._start_token_id = start_token_id
        self._closing: set[asyncio.Task[None]] = set()
        self.draining = False

    def admit(self, requests: tuple[PromptRequest, ...]) -> Session:
        """Admit a request of one or several prompts. Raises BusyError, InvalidRequestError or DrainingError."""
        if self.draining:
            raise DrainingError("the server is stopping; another replica may answer")
        session = Session(requests, time.monotonic())
        self.check_capacity(session.fairness_key, session.num_candidates)
        return session

    def check_capacity(self, fairness_key: str, num_candidates: int) -> None:
        """Raises BusyError or InvalidRequestError when there is no room for these sequences of one adapter."""
        self._admission.check(fairness_key, num_candidates)

    async def run(self, session: Session) -> AsyncIterator[Piece]:
        """The pieces of all candidates as they come. Closing it early cancels the rest and releases the adapter."""
        self._admission.acquire(session.fairness_key, session.num_candidates)
        candidates: list[Candidate] = []
        try:
            if session.adapter_id:
                await self._lease(session)
            queue: _Queue = asyncio.Queue()
            for prompt_index, request in enumerate(session.requests):
                for index in range(request.num_candidates):
                    candidates.append(self._submit(session, prompt_index, index, len(candidates), queue))
            session.set_cancel_callback(partial(_fail_request, candidates, queue))
            while not all(candidate.ended for candidate in candidates):
                candidate, event = await self._next(queue, session)
                if candidate.ended:
                    continue  # the engine drew it before it was told of the stop string
                if event.error is not None:
                    raise event.error
                session.note_token(candidate, self._metrics)
                yield candidate.on_event(event)
                if candidate.ended and not candidate.released.is_set():
                    self._engine.cancel(candidate.sequence)
        finally:
            # A task of its own: this coroutine may be cancelled, and the engine must release the sequences first.
            task = asyncio.create_task(self._close(session, candidates))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _next(self, queue: _Queue, session: Session) -> tuple[Candidate, TokenEvent]:
        """The next event. Raises BusyError when the request has waited longer than `max_queue_seconds`."""
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
        """Leases the adapter. Raises RequestError, also for a prompt that does not fit with its virtual tokens."""
        session.adapter = await self._adapters.acquire(session.adapter_id)
        session.leased_seconds = time.monotonic()
        requests = session.requests
        session.note_remaining(sum(item.params.max_new_tokens * item.num_candidates for item in requests))
        for i, request in enumerate(requests):
            try:
                self._check_context_length(request, session.adapter)
            except InvalidRequestError as error:
                add_prompt_index(error, i, len(requests))
                raise

    def _check_context_length(self, request: PromptRequest, adapter: LoadedRevision) -> None:
        """The adapter's virtual tokens take positions too; their number is known only after the lease."""
        num_prompt, num_virtual, length = len(request.prompt), adapter.num_virtual_tokens, self._limits.context_length
        if num_virtual + num_prompt + request.max_output_tokens > length:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; with the {num_virtual} virtual tokens of adapter "
                f"{request.adapter_id!r} and {request.describe_output} it must fit into the context of {length}",
                "prompt",
            )
        self._limits.check_source_length(num_prompt, adapter.num_prompt_tokens, "prompt")

    def _submit(self, session: Session, prompt_index: int, index: int, number: int, queue: _Queue) -> Candidate:
        """Submits candidate `index` of a prompt, `number` among all, to the engine."""
        request = session.requests[prompt_index]

        def emit(event: TokenEvent) -> None:
            if event.is_last:
                candidate.released.set()
            if event.token_id is not None or event.error is not None:
                queue.put_nowait((candidate, event))

        def on_first_scheduled() -> None:
            session.note_started(prompt_index, sequence.num_reused_tokens)

        sequence = self._make_sequence(session, request, index, emit, on_first_scheduled)
        params = request.params
        text = TextStream(self._tokenizer, request.stop_strings, request.include_stop_string, params.min_new_tokens)
        candidate = Candidate(number, sequence, text, asyncio.Event())
        self._engine.submit(sequence)
        return candidate

    def _make_sequence(
        self,
        session: Session,
        request: PromptRequest,
        index: int,
        emit: Callable[[TokenEvent], None],
        on_first_scheduled: Callable[[], None],
    ) -> Sequence:
        prompt, adapter = request.prompt, session.adapter
        scored = request.continuations[index] if request.continuations else []
        room = self._limits.context_length - session.num_virtual_tokens - len(prompt)
        is_decoder_only = self._start_token_id is None
        if is_decoder_only:
            num_virtual, num_virtual_encoder = session.num_virtual_tokens, 0
        else:
            num_virtual = 0 if adapter is None else adapter.num_prefix_tokens
            num_virtual_encoder = 0 if adapter is None else adapter.num_prompt_tokens
        return Sequence(
            prompt=prompt + scored if self._start_token_id is None else [self._start_token_id, *scored],
            params=replace(request.params, max_new_tokens=min(request.params.max_new_tokens, room)),
            index=index,
            emit=emit,
            slot=BASE_SLOT if adapter is None else adapter.slot,
            revision="" if adapter is None else adapter.revision,
            num_virtual_tokens=num_virtual,
            encoder_input=[] if is_decoder_only else prompt,
            num_virtual_encoder_tokens=num_virtual_encoder,
            on_first_scheduled=on_first_scheduled,
            fairness_key="" if adapter is None else adapter.id,
            priority=request.priority,
            first_logprob=len(prompt) if scored and is_decoder_only else 1,
        )

    async def _close(self, session: Session, candidates: Iterable[Candidate]) -> None:
        session.set_cancel_callback(None)
        for candidate in candidates:
            if not candidate.released.is_set():
                self._engine.cancel(candidate.sequence)
                await candidate.released.wait()
        self._admission.release(session.fairness_key, session.num_candidates)
        if session.adapter is not None:
            session.note_remaining(0)
            await self._adapters.release(session.adapter)

    async def wait_closed(self) -> None:
        """Wait until every ended request has released what it held."""
        while self._closing:
            await asyncio.wait(set(self._closing))


def _fail_request(candidates: Iterable[Candidate], queue: _Queue, error: RequestError) -> None:
    """Fails a request through one of its running candidates, if any."""
    for candidate in candidates:
        if not candidate.ended:
            return queue.put_nowait((candidate, TokenEvent(None, error=error)))


def dispatch(events: Delivery) -> None:
    """Deliver a step's events to their sequences. Called in the event loop, once per step."""
    for sequence, event in events:
        sequence.emit(event)
