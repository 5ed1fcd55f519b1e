"""The endpoints of the HTTP front. Each request becomes what gRPC's would be, and runs as gRPC's does."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from aiohttp import web

from quiver_peft.chat_template import ChatTemplate
from quiver_peft.errors import ChatError
from quiver_peft.files.json_files import JsonError, parse_json
from quiver_server.answering import Answering
from quiver_server.call import current_call
from quiver_server.errors import InvalidRequestError, RequestError
from quiver_server.http.answers import Head, Json, Writer
from quiver_server.http.chat import read_messages
from quiver_server.http.choices import Choices
from quiver_server.http.errors import dumps, error_body, error_response
from quiver_server.http.models import Models
from quiver_server.http.parameters import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    Question,
    read_question,
)
from quiver_server.http.prompts import read_prompts
from quiver_server.session import Piece, Session

_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class NoChatTemplateError(InvalidRequestError):
    """The base has no chat template: it was not made for chats, or its folder lacks a file."""

    reason = "NO_CHAT_TEMPLATE"


@dataclass(frozen=True)
class _Answer:
    """One answer in the making."""

    question: Question
    writer: Writer
    session: Session
    choices: Choices


class Handlers:
    """`/v1/*`. chat_template: the base's, if it has one."""

    def __init__(self, answering: Answering, models: Models, chat_template: ChatTemplate | None) -> None:
        self._answering = answering
        self._models = models
        self._chat_template = chat_template

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models`."""
        return web.json_response({"object": "list", "data": await self._models.listed()}, dumps=dumps)

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models/ID`."""
        return web.json_response(await self._models.described(request.match_info["model"]), dumps=dumps)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        body = await _read_body(request)
        question = read_question(body, "prompt", COMPLETION_PARAMETERS)
        return await self._answer(request, question, read_prompts(body.get("prompt")), is_chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        body = await _read_body(request)
        question = read_question(body, "messages", CHAT_PARAMETERS)
        messages = read_messages(body.get("messages"))
        if self._chat_template is None:
            raise NoChatTemplateError(
                "the base has no chat template: its folder needs chat_template.jinja, or chat_template in "
                "tokenizer_config.json; /v1/completions takes plain prompts",
                "messages",
            )
        try:
            text = self._chat_template.render(messages)
        except ChatError as error:
            raise InvalidRequestError(str(error), "messages") from None
        try:
            # The template writes the special tokens itself.
            ids = await self._answering.tokenize(text, add_special_tokens=False)
        except RequestError as error:
            return _refused(error, question)
        return await self._answer(request, question, [ids], is_chat=True)

    async def _answer(
        self, request: web.Request, question: Question, prompts: Sequence[str | list[int]], *, is_chat: bool
    ) -> web.StreamResponse:
        writer = Writer(self._answering.tokenizer, is_chat=is_chat, with_token_ids=question.return_token_ids)
        question.message.adapter_id = await self._models.adapter_id(question.model)
        try:
            session = await self._answering.open_several(question.message, prompts, draws=question.draws)
            choices = Choices(self._answering.tokenizer, session, prompts if question.echo else ())
            answer = _Answer(question, writer, session, choices)
            async with aclosing(cast("Any", self._answering.pieces(session))) as pieces:
                if question.stream:
                    return await self._stream(request, answer, pieces)
                async for piece in pieces:
                    choices.add(piece)
            return web.json_response(text=await self._whole(answer))
        except RequestError as error:
            return _refused(error, question)

    def _head(self, session: Session, is_chat: bool) -> Head:
        prefix = "chatcmpl" if is_chat else "cmpl"
        return Head(f"{prefix}-{current_call().request_id}", *self._models.answered(session))

    async def _stream(self, request: web.Request, answer: _Answer, pieces: AsyncIterator[Piece]) -> web.StreamResponse:
        """Server-sent events. What fails before the first token has a status of its own, later only an event."""
        first = await anext(pieces)
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        await response.prepare(request)
        try:
            async for chunk in self._chunks(answer, first, pieces):
                await _send(response, dumps(chunk))
            await _send(response, "[DONE]")
        except RequestError as error:
            current_call().refuse(error)
            await _send(response, dumps(error_body(error, answer.question.names)))
        await response.write_eof()
        return response

    async def _whole(self, answer: _Answer) -> str:
        head, parts = self._head(answer.session, answer.writer.is_chat), answer.choices.parts
        work = partial(answer.writer.whole, head, parts, answer.session)
        return dumps(await asyncio.to_thread(work) if answer.question.echo else work())

    async def _chunks(self, answer: _Answer, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Json]:
        question, writer, session, choices = answer.question, answer.writer, answer.session, answer.choices
        head = self._head(session, writer.is_chat)
        without_usage = {"usage": None} if question.include_usage else {}
        for chunk in writer.opening(head, session.num_candidates):
            yield {**chunk, **without_usage}
        piece: Piece | None = first
        while piece is not None:
            choices.add(piece)
            part = choices.take(piece.index)
            if writer.says_something(part):
                work = partial(writer.chunk, head, part)
                # A prompt may be long: the loop answers others meanwhile.
                chunk = await asyncio.to_thread(work) if part.echo else work()
                yield {**chunk, **without_usage}
            piece = await anext(pieces, None)
        if question.include_usage:
            yield writer.closing(head, session)


def _refused(error: RequestError, question: Question) -> web.Response:
    current_call().refuse(error)
    return error_response(error, question.names)


async def _send(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


async def _read_body(request: web.Request) -> Mapping[str, Any]:
    """The request's JSON object. Raises InvalidRequestError, and aiohttp's error for a body that is too large."""
    if request.content_type != "application/json":
        # Nor can a web page of somebody else's then send one: browsers ask before they do.
        raise web.HTTPUnsupportedMediaType(text="the body must be JSON, with Content-Type: application/json")
    raw = await request.read()
    try:
        body = parse_json(raw, "the body")
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except JsonError as error:
        raise InvalidRequestError(str(error)) from None
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the body: not valid JSON: {error}") from None
    return body
