"""Greedy decoding of many prompts at once with the paged cache: for evaluation and prediction outside of a server."""

from collections.abc import Callable, Collection, Iterator, Sequence

from quiver_peft.adapters.weights import AdapterWeights
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_peft.decode_step import GPTStep, Row, T5Step
from quiver_peft.errors import QuiverError


def greedy_decode(
    base: GPTBase | T5Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    weights: AdapterWeights | None = None,
    max_rows: int = 32,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The greedy answer to each prompt, its stop token left out: a GPT's continuation, a T5's target.

    Rows are decoded `max_rows` at a time; a finished row makes room for the next prompt at once.
    weights: of the adapter that answers, applied by the banks, as a server would; None: the base answers.
    on_finished: called with the number of new tokens whenever a row ends.
    Raises QuiverError for a prompt that is empty or leaves no room for its answer.
    """
    _check_room(base, prompts, max_new_tokens, 0 if weights is None else weights.num_virtual_tokens)
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    kind = T5Step if isinstance(base, T5Base) else GPTStep
    step = kind(base, weights, longest, max_new_tokens, max_rows)  # pyright: ignore[reportArgumentType]
    free = step.block_tables(max_rows)
    waiting = iter([Row(i, prompt, []) for i, prompt in enumerate(prompts)])
    running: list[Row] = []
    results: list[list[int]] = [[] for _ in prompts]
    while running := running + _admit(waiting, free):
        for row, token in zip(running, step.run(running), strict=True):
            if token not in stop_ids:
                row.generated.append(token)
            if token in stop_ids or len(row.generated) == max_new_tokens:
                results[row.index] = row.generated
                free.append(row.blocks)
                row.blocks = []
                if on_finished is not None:
                    on_finished(len(row.generated))
        running = [row for row in running if row.blocks]
    return results


def _check_room(
    base: GPTBase | T5Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_virtual: int
) -> None:
    if max_new_tokens < 1:
        raise QuiverError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    limit = None if base.config.max_positions is None else base.config.max_positions - num_virtual
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise QuiverError(f"prompt {index} is empty; there is nothing to continue")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise QuiverError(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones that is over the {limit} "
                "positions of this base" + (f" beside {num_virtual} virtual tokens" if num_virtual else "")
            )


def _admit(waiting: Iterator[Row], free: list[list[int]]) -> list[Row]:
    """Starts waiting rows while there are free blocks."""
    admitted: list[Row] = []
    while free and (row := next(waiting, None)) is not None:
        row.blocks = free.pop()
        admitted.append(row)
    return admitted
