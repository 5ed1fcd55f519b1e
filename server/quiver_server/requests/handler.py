"""Request handler shared by gRPC and HTTP: authorize, validate, admit, run, record."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from quiver_peft.tokenizer import Tokenizer
from quiver_server.auth import current_caller
from quiver_server.errors import DrainingError, RequestError, require
from quiver_server.requests.generation import RequestRunner
from quiver_server.requests.limits import Limits
from quiver_server.requests.prompt_request import GenerationRequest, ScoringRequest, fairness_key_of
from quiver_server.requests.session import Piece, Session
from quiver_server.requests.validation import validate
from quiver_server.telemetry.call import CallContext, current_call
from quiver_server.telemetry.metrics import Metrics

_LONG_CHARACTERS = 16 * 1024  # tokenizing so many takes milliseconds

T = TypeVar("T")


async def _in_thread_if_long(num_characters: int, work: Callable[[], T]) -> T:
    """Long texts are tokenized in a thread, so that the event loop serves other requests meanwhile."""
    return await asyncio.to_thread(work) if num_characters > _LONG_CHARACTERS else work()


class RequestHandler:
    """Opens sessions for the current caller and runs them. Lives in the event loop."""

    def __init__(self, request_runner: RequestRunner, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self.request_runner = request_runner
        self.tokenizer = tokenizer
        self.limits = limits
        self._metrics = metrics

    async def open_session(self, request: GenerationRequest | ScoringRequest) -> Session:
        """Admit a request: all of its prompts or none. Raises RequestError."""
        try:
            current_caller().check_adapter(request.adapter_id)
            if len(request.prompts) > 1:  # before tokenizing any
                self.request_runner.check_capacity(fairness_key_of(request.adapter_id), len(request.prompts))
            num_characters = sum(map(len, request.prompts))
            if isinstance(request, ScoringRequest):
                num_characters += sum(map(len, request.continuations))
            work = partial(validate, request, self.tokenizer, self.limits)
            return self.request_runner.admit(await _in_thread_if_long(num_characters, work))
        except RequestError as error:
            self._metrics.requests.labels("", error.code.name).inc()
            raise

    async def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, as a prompt has them. Raises RequestError."""
        if self.request_runner.draining:
            raise DrainingError("the server is stopping")
        require(bool(text), "text", "empty", "at least one character")
        self.limits.check_text(text, "text")
        return await _in_thread_if_long(len(text), partial(self.tokenizer.encode, text))

    async def pieces(self, session: Session) -> AsyncIterator[Piece]:
        """The session's pieces, within the caller's limits. Raises RequestError."""
        code = "CANCELLED"
        pieces = self.request_runner.run(session)
        try:
            with current_caller().reserve(session.num_candidates):
                async for piece in pieces:
                    yield piece
            code = "OK"
        except RequestError as error:
            code = error.code.name
            raise
        finally:
            await pieces.aclose()  # type: ignore[attr-defined] - an async generator
            _log_request(current_call(), session)
            metrics = self._metrics
            adapter = metrics.adapter_label("" if session.adapter is None else session.adapter.id)
            metrics.requests.labels(adapter, code).inc()
            metrics.prompt_tokens.labels(adapter).inc(session.num_sent_tokens)
            metrics.cached_prompt_tokens.labels(adapter).inc(session.num_reused_tokens)
            metrics.generated_tokens.labels(adapter).inc(session.num_generated_tokens)


def _log_request(call: CallContext, session: Session) -> None:
    """Adds the request's counts, names and times to the record of its call, and never its text."""
    if session.adapter is not None:
        call.details |= {"adapter": session.adapter.id, "revision": session.adapter.revision}
    call.details |= {
        "candidates": session.num_candidates,
        "prompt_tokens": session.num_sent_tokens,
        "cached_tokens": session.num_reused_tokens,
        "generated_tokens": session.num_generated_tokens,
    }
    arrival = session.arrival_seconds
    call.events["queued"] = arrival
    for name, began in (
        ("adapter_ready", session.leased_seconds),
        ("prefill", session.started_seconds),
        ("decode", session.first_token_seconds),
    ):
        if began is not None:
            call.events[name] = began
    if session.started_seconds is not None:
        call.details["queue_seconds"] = round(session.started_seconds - arrival, 6)
    if session.first_token_seconds is not None:
        call.details["time_to_first_token_seconds"] = round(session.first_token_seconds - arrival, 6)
