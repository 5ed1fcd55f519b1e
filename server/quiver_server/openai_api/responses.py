"""HTTP responses in OpenAI's form: completions and chat completions, whole or as chunks of a stream."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quiver_peft.tokenizer import Tokenizer
from quiver_server.engine.sequence import FinishReason, TokenLogprob
from quiver_server.openai_api.choices import Part
from quiver_server.requests.detokenizer import token_offsets
from quiver_server.requests.session import Session

_LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
Json = dict[str, Any]


@dataclass(frozen=True)
class ResponseHead:
    """The fields that all messages of one answer have.

    model: with aliases resolved. revision: of the adapter, or the base's fingerprint.
    """

    id: str
    model: str
    revision: str
    created_seconds: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> Json:
        """The JSON fields of a message of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_seconds,
            "model": self.model,
            "system_fingerprint": self.revision,
        }


class ResponseWriter:
    """Writes completions or, with is_chat, chat completions. with_token_ids: an extension, adds them to each choice."""

    def __init__(self, tokenizer: Tokenizer, *, is_chat: bool, with_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self.is_chat = is_chat
        self._with_token_ids = with_token_ids

    def completion(self, head: ResponseHead, parts: Iterable[Part], session: Session) -> Json:
        """The whole answer."""
        choices = [self._choice(part, self._message(part)) for part in parts]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**head.fields(kind), "choices": choices, "usage": usage(session)}

    def chunk(self, head: ResponseHead, part: Part) -> Json:
        """One chunk of a stream."""
        text = _text(part)
        content: Json = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return {**head.fields(self._chunk_kind), "choices": [self._choice(part, content)]}

    def first_chunks(self, head: ResponseHead, num_candidates: int) -> list[Json]:
        """The first chunks of a stream: in a chat, the role of each choice."""
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        fields = head.fields(self._chunk_kind)
        return [{**fields, "choices": [{"index": i, **choice}]} for i in range(num_candidates if self.is_chat else 0)]

    def usage_chunk(self, head: ResponseHead, session: Session) -> Json:
        """The last chunk of a stream with `include_usage`."""
        return {**head.fields(self._chunk_kind), "choices": [], "usage": usage(session)}

    def has_content(self, part: Part) -> bool:
        """Whether a part needs a chunk. It may be empty: a token can end within a character."""
        return bool(part.text or part.logprobs or part.finish_reason or part.echo or self._with_token_ids)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _message(self, part: Part) -> Json:
        if not self.is_chat:
            return {"text": _text(part)}
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
        if not self.is_chat:
            return self._completion_logprobs(part)
        return self._chat_logprobs(part.logprobs) if part.logprobs else None

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
        # Part of a character has no text to take bytes from.
        spelled = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": spelled}

    def _completion_logprobs(self, part: Part) -> Json | None:
        """With `echo` also the prompt's; its first token has no log-probability."""
        items, offsets, first = part.logprobs, part.offsets, list[int]()
        if part.echo is not None and part.echo.logprobs is not None:
            items, first = [*part.echo.logprobs, *items], [part.echo.token_ids[0]]
            offsets = token_offsets(self._tokenizer, part.echo.token_ids) + offsets
        if not offsets:
            return None
        unknown = [None] * len(first)
        return {
            "tokens": self._tokenizer.pieces([*first, *(item.token_id for item in items)]),
            "token_logprobs": [*unknown, *(max(item.logprob, _LEAST_LOGPROB) for item in items)],
            "top_logprobs": [*unknown, *(self._top(item) for item in items)],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        """By text. Of two tokens with the same text the more likely one is kept."""
        texts = self._tokenizer.pieces([token for token, _ in item.top])
        best: dict[str, float] = {}
        for text, (_, logprob) in zip(texts, item.top, strict=True):
            best.setdefault(text, max(logprob, _LEAST_LOGPROB))
        return best


def _text(part: Part) -> str:
    return part.text if part.echo is None else part.echo.text + part.text


def usage(session: Session) -> Json:
    """Token counts over the whole request, the same as in gRPC's Usage."""
    prompt, generated = session.num_prompt_tokens, session.num_generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": session.num_reused_tokens},
    }
