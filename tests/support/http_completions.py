"""Completions over HTTP as the tests ask for them, and what both faces say of one."""

from typing import Any

from openai import OpenAI
from openai.types import Completion, CompletionChoice

PROMPT = [5, 22, 39, 56, 73, 90]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
_THEIRS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos")


def asked(model: str, prompt: Any, **parameters: Any) -> dict[str, Any]:
    """Arguments for OpenAI's client, which does not know all parameters: those travel beside its own."""
    parameters = {"temperature": 0.0, "max_tokens": 12, **parameters}
    extra = {name: parameters.pop(name) for name in (*_THEIRS, "include_stop_str_in_output") if name in parameters}
    return {"model": model, "prompt": prompt, "extra_body": {"return_token_ids": True, **extra}, **parameters}


def complete(http: OpenAI, model: str, prompt: Any = PROMPT, **parameters: Any) -> Completion:
    """A completion that tells its token ids."""
    return http.completions.create(**asked(model, prompt, **parameters))


def stream(http: OpenAI, model: str, prompt: Any = PROMPT, **parameters: Any) -> list[Completion]:
    """The chunks of a stream."""
    return list(http.completions.create(**asked(model, prompt, stream=True, **parameters)))


def ids(choice: CompletionChoice) -> tuple[int, ...]:
    """Beyond OpenAI's, which the types do not know."""
    return tuple(getattr(choice, "token_ids"))  # noqa: B009


def assert_adds_up(chunks: list[Completion], whole: Completion) -> None:
    """The chunks of each choice, put together, are the choice; none but the last has a reason."""
    for expected in whole.choices:
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index]
        assert "".join(part.text for part in parts) == expected.text
        assert sum((ids(part) for part in parts), ()) == ids(expected)
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == expected.finish_reason
        told = [part.logprobs for part in parts if part.logprobs is not None]
        assert bool(told) == (expected.logprobs is not None)
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if told else ():
            assert [value for item in told for value in getattr(item, name)] == getattr(expected.logprobs, name)
