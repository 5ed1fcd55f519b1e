"""Sequences and parameters for the engine's unit tests, short of what a test says."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quiver_server.engine.sequence import SamplingParams, Sequence, TokenEvent

GREEDY = SamplingParams(max_new_tokens=8)


def ignore(event: TokenEvent) -> None:
    """An `emit` for tests that look at something else."""


def sequence(
    prompt: list[int] | int,
    slot: int = 0,
    *,
    emit: Callable[[TokenEvent], None] = ignore,
    index: int = 0,
    params: Mapping[str, Any] | None = None,
    **more: Any,
) -> Sequence:
    """A sequence of these tokens, or of this many. params, more: fields of SamplingParams that are not as in GREEDY.

    Another slot is another adapter, whose requests are another tenant's.
    """
    tokens = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    name = f"adapter-{slot}" if slot else ""
    params_ = replace(GREEDY, **{**(params or {}), **more})
    return Sequence(prompt=tokens, params=params_, index=index, emit=emit, slot=slot, revision=name, fairness_key=name)
