"""Answers as OpenAI's API writes them: what the engine's pieces become, whole or as chunks of a stream."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quiver_peft.tokenizer import Tokenizer
from quiver_server.generation import Piece, Session
from quiver_server.request import FinishReason, TokenLogprob

_LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
Json = dict[str, Any]


@dataclass
class Part:
    """What one candidate has said, or one chunk of it. num_characters: of its tokens before this part."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish_reason: FinishReason | None = None
    num_characters: int = 0

    def add(self, piece: Piece) -> None:
        """One token more."""
        self.text += piece.text
        self.token_ids.append(piece.token_id)
        if piece.logprob is not None:
            self.logprobs.append(piece.logprob)
        self.finish_reason = piece.finish_reason


@dataclass(frozen=True)
class Head:
    """What every message of one answer repeats.

    model: which one answers, an alias resolved. revision: of the adapter, or the base's fingerprint.
    """

    id: str
    model: str
    revision: str
    created_seconds: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> Json:
        """As JSON."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_seconds,
            "model": self.model,
            "system_fingerprint": self.revision,
        }


class Writer:
    """Both of OpenAI's forms. is_chat: the one of chats; with_token_ids: beyond OpenAI's, each choice tells them."""

    def __init__(self, tokenizer: Tokenizer, *, is_chat: bool, with_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self.is_chat = is_chat
        self._with_token_ids = with_token_ids

    def whole(self, head: Head, parts: Iterable[Part], session: Session) -> Json:
        """The answer at once."""
        choices = [self._choice(part, self._message(part)) for part in parts]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**head.fields(kind), "choices": choices, "usage": usage(session)}

    def chunk(self, head: Head, part: Part) -> Json:
        """A part of a stream."""
        content: Json = {"delta": {"content": part.text} if part.text else {}} if self.is_chat else {"text": part.text}
        return {**head.fields(self._chunk_kind), "choices": [self._choice(part, content)]}

    def opening(self, head: Head, num_candidates: int) -> list[Json]:
        """What a stream begins with: in a chat, whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        fields = head.fields(self._chunk_kind)
        return [{**fields, "choices": [{"index": i, **choice}]} for i in range(num_candidates if self.is_chat else 0)]

    def closing(self, head: Head, session: Session) -> Json:
        """The last chunk of a stream that asked for its usage."""
        return {**head.fields(self._chunk_kind), "choices": [], "usage": usage(session)}

    def says_something(self, part: Part) -> bool:
        """Whether a part is worth a chunk: a token may end within a character."""
        return bool(part.text or part.logprobs or part.finish_reason or self._with_token_ids)

    def num_characters(self, part: Part) -> int:
        """Of a part's tokens, each by itself."""
        return sum(map(len, self._tokenizer.pieces(part.token_ids)))

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _message(self, part: Part) -> Json:
        if not self.is_chat:
            return {"text": part.text}
        return {"message": {"role": "assistant", "content": part.text, "refusal": None}}

    def _choice(self, part: Part, content: Json) -> Json:
        reason = part.finish_reason
        choice: Json = {"index": part.index, **content, "logprobs": self._logprobs(part), "finish_reason": None}
        if reason is not None:
            choice["finish_reason"] = "length" if reason is FinishReason.LENGTH else "stop"
        if self._with_token_ids:
            choice["token_ids"] = part.token_ids
        return choice

    def _logprobs(self, part: Part) -> Json | None:
        if not part.logprobs:
            return None
        return self._chat_logprobs(part.logprobs) if self.is_chat else self._completion_logprobs(part)

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        content = [
            {
                **self._token(item.token_id, item.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in item.top],
            }
            for item in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        (text,) = self._tokenizer.pieces([token])
        # A token within a character has no text of its own to take bytes from.
        spelled = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": spelled}

    def _completion_logprobs(self, part: Part) -> Json:
        texts = self._tokenizer.pieces([item.token_id for item in part.logprobs])
        offsets = [part.num_characters + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [max(item.logprob, _LEAST_LOGPROB) for item in part.logprobs],
            "top_logprobs": [self._top(item) for item in part.logprobs],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        """By text, in which two tokens may be alike: the likelier one is told."""
        texts = self._tokenizer.pieces([token for token, _ in item.top])
        best: dict[str, float] = {}
        for text, (_, logprob) in zip(texts, item.top, strict=True):
            best.setdefault(text, max(logprob, _LEAST_LOGPROB))
        return best


def usage(session: Session) -> Json:
    """Tokens counted over the whole request, as gRPC's Usage counts them."""
    prompt, generated = len(session.asked.prompt), session.num_generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": session.num_reused_tokens},
    }
