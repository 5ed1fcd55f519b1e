"""Between the service and the engine: a request is read, allowed, admitted and run, and its end counted."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from quiver.v1 import generation_pb2
from quiver_peft.tokenizer import Tokenizer
from quiver_server.auth import current_caller
from quiver_server.errors import DrainingError, RequestError, require
from quiver_server.requests.generation import RequestRunner
from quiver_server.requests.limits import Limits
from quiver_server.requests.prompt_request import PromptRequest, fairness_key_of, prompt_error_context
from quiver_server.requests.session import Piece, Session
from quiver_server.requests.validation import parse_generate_request, parse_score_request
from quiver_server.telemetry.call import CallContext, current_call, set_request_id
from quiver_server.telemetry.metrics import Metrics

_LONG_BYTES = 16 * 1024  # what takes milliseconds to tokenize

T = TypeVar("T")


async def _in_thread_if_long(num_bytes: int, work: Callable[[], T]) -> T:
    """Long texts are read in a thread: the loop answers others meanwhile."""
    return await asyncio.to_thread(work) if num_bytes > _LONG_BYTES else work()


class RequestHandler:
    """Opens sessions for the current caller and runs them. Lives in the event loop."""

    def __init__(self, request_runner: RequestRunner, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self.generator = request_runner
        self.tokenizer = tokenizer
        self.limits = limits
        self._metrics = metrics

    async def submit(self, message: generation_pb2.GenerateRequest) -> Session:
        """Admit a request to generate. Raises RequestError."""
        return await self._submit(
            message, lambda: (parse_generate_request(message, self.tokenizer, self.limits),), 1, message.ByteSize()
        )

    async def submit_batch(
        self, message: generation_pb2.GenerateRequest, prompts: Sequence[str | list[int]], *, draws: bool
    ) -> Session:
        """Admit one request of several prompts, texts or token ids: all of them or none.

        message: what else it says; its own prompt is overwritten. draws: whether tokens are generated; otherwise the
        prompts are scored. Raises RequestError.
        """

        def read() -> tuple[PromptRequest, ...]:
            several: list[PromptRequest] = []
            for i, prompt in enumerate(prompts):
                _set_prompt(message, prompt)
                with prompt_error_context(i, len(prompts)):
                    asked = parse_generate_request(message, self.tokenizer, self.limits)
                several.append(asked if draws else asked.as_scoring_request())
            return tuple(several)

        return await self._submit(message, read, len(prompts), sum(map(len, prompts)))

    async def submit_score(self, message: generation_pb2.ScoreRequest) -> Session:
        """Admit a request to score. Raises RequestError."""
        return await self._submit(
            message, lambda: (parse_score_request(message, self.tokenizer, self.limits),), 1, message.ByteSize()
        )

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text that could be a prompt. Raises RequestError."""
        if self.generator.draining:
            raise DrainingError("the server is stopping")
        require(bool(text), "text", "empty", "at least one character")
        self.limits.check_text(text, "text")
        return await _in_thread_if_long(
            len(text), lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def _submit(
        self,
        message: generation_pb2.GenerateRequest | generation_pb2.ScoreRequest,
        read: Callable[[], tuple[PromptRequest, ...]],
        num_prompts: int,
        num_bytes: int,
    ) -> Session:
        try:
            if message.request_id:
                set_request_id(message.request_id)
            current_caller().check_adapter(message.adapter_id)
            if num_prompts > 1:  # before anything is spent on them
                self.generator.check_capacity(fairness_key_of(message.adapter_id), num_prompts)
            return self.generator.admit(await _in_thread_if_long(num_bytes, read))
        except RequestError as error:
            self._metrics.requests.labels("", error.code.name).inc()
            raise

    async def pieces(self, session: Session) -> AsyncIterator[Piece]:
        """The session's pieces, within the caller's limits. Raises RequestError."""
        code = "CANCELLED"
        pieces = self.generator.run(session)
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


def _set_prompt(message: generation_pb2.GenerateRequest, prompt: str | list[int]) -> None:
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokens.CopyFrom(generation_pb2.TokenIds(ids=prompt))


def _log_request(call: CallContext, session: Session) -> None:
    """What a request came to, in the record of its call: counts and names, nothing that was said."""
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
