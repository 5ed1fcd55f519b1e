"""HTTP endpoints: parses a body, submits it to the shared request handler, responds whole or as a stream."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from aiohttp import web

from quiver_peft.chat_template import ChatTemplate
from quiver_peft.files.json_files import JsonError, parse_json
from quiver_server.errors import InvalidRequestError, RequestError
from quiver_server.openai_api.choices import Choices
from quiver_server.openai_api.errors import dumps, error_body, error_response
from quiver_server.openai_api.messages import render_messages
from quiver_server.openai_api.models import Models
from quiver_server.openai_api.parameters import ParsedRequest, read_chat, read_completion
from quiver_server.openai_api.responses import Json, ResponseHead, ResponseWriter
from quiver_server.requests.handler import RequestHandler
from quiver_server.requests.session import Piece, Session
from quiver_server.telemetry.call import current_call

_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


@dataclass(frozen=True)
class _Answer:
    """One answer in progress."""

    parsed: ParsedRequest
    writer: ResponseWriter
    session: Session
    choices: Choices


class Routes:
    """The endpoints under `/v1`. chat_template: the base's, if it has one."""

    def __init__(self, handler: RequestHandler, models: Models, chat_template: ChatTemplate | None) -> None:
        self._handler = handler
        self._models = models
        self._chat_template = chat_template

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models`."""
        return web.json_response({"object": "list", "data": await self._models.list()}, dumps=dumps)

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models/ID`."""
        return web.json_response(await self._models.describe(request.match_info["model"]), dumps=dumps)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        parsed = read_completion(await _read_body(request))
        return await self._respond(request, parsed, is_chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        body = await _read_body(request)
        parsed = read_chat(body)
        parsed.request.prompts = (render_messages(body.get("messages"), self._chat_template),)
        return await self._respond(request, parsed, is_chat=True)

    async def _respond(self, request: web.Request, parsed: ParsedRequest, *, is_chat: bool) -> web.StreamResponse:
        parsed.request.adapter_id = await self._models.adapter_id(parsed.model)
        try:
            session = await self._handler.open_session(parsed.request)
            writer = ResponseWriter(self._handler.tokenizer, is_chat=is_chat, with_token_ids=parsed.return_token_ids)
            choices = Choices(self._handler.tokenizer, session, parsed.request.prompts if parsed.echo else ())
            answer = _Answer(parsed, writer, session, choices)
            async with aclosing(cast("Any", self._handler.pieces(session))) as pieces:
                if parsed.stream:
                    return await self._stream(request, answer, pieces)
                async for piece in pieces:
                    choices.add(piece)
            return web.json_response(text=await self._whole(answer))
        except RequestError as error:
            current_call().refuse(error)
            return error_response(error, parsed.field_names)

    def _head(self, session: Session, is_chat: bool) -> ResponseHead:
        prefix = "chatcmpl" if is_chat else "cmpl"
        return ResponseHead(f"{prefix}-{current_call().request_id}", *self._models.response_name(session))

    async def _stream(self, request: web.Request, answer: _Answer, pieces: AsyncIterator[Piece]) -> web.StreamResponse:
        """Server-sent events. A failure before the first token has its own status, a later one is only an event."""
        first = await anext(pieces)
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        await response.prepare(request)
        try:
            async for chunk in self._chunks(answer, first, pieces):
                await _send(response, dumps(chunk))
            await _send(response, "[DONE]")
        except RequestError as error:
            current_call().refuse(error)
            await _send(response, dumps(error_body(error, answer.parsed.field_names)))
        await response.write_eof()
        return response

    async def _whole(self, answer: _Answer) -> str:
        head, parts = self._head(answer.session, answer.writer.is_chat), answer.choices.parts
        work = partial(answer.writer.completion, head, parts, answer.session)
        return dumps(await asyncio.to_thread(work) if answer.parsed.echo else work())

    async def _chunks(self, answer: _Answer, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Json]:
        parsed, writer, session, choices = answer.parsed, answer.writer, answer.session, answer.choices
        head = self._head(session, writer.is_chat)
        without_usage = {"usage": None} if parsed.include_usage else {}
        for chunk in writer.first_chunks(head, session.num_candidates):
            yield {**chunk, **without_usage}
        piece: Piece | None = first
        while piece is not None:
            choices.add(piece)
            part = choices.take(piece.index)
            if writer.has_content(part):
                work = partial(writer.chunk, head, part)
                # An echoed prompt may be long; the event loop serves other requests meanwhile.
                chunk = await asyncio.to_thread(work) if part.echo else work()
                yield {**chunk, **without_usage}
            piece = await anext(pieces, None)
        if parsed.include_usage:
            yield writer.usage_chunk(head, session)


async def _send(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


async def _read_body(request: web.Request) -> Mapping[str, Any]:
    """The body's JSON object. Raises InvalidRequestError, and aiohttp's error for a body that is too large."""
    if request.content_type != "application/json":
        # Also a defense: browsers ask the server before a foreign web page may send this type.
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
