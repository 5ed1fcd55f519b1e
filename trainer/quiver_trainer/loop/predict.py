"""Greedy decoding of many prompts, for validation, `Trainer.predict` and `quiver predict`."""

from collections.abc import Callable, Sequence

from quiver_peft.decode import greedy_decode
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.errors import DataError


def predict_tokens(
    model: AnyModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, at most up to the end of the base's context.

    Dropout is off. on_finished: called with the number of new tokens of each finished answer.
    Raises DataError for a prompt that fills the context.
    """
    max_tokens = model.max_tokens
    weights = None if model.adapter is None else model.adapter.weights(model.base)
    # Rows with little room left are decoded apart, each with its own limit.
    by_room: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        room = max_new_tokens if max_tokens is None else max_tokens - len(prompt)
        if room < 1:
            raise DataError(f"prompt {i + 1} has {len(prompt)} tokens; the base takes {max_tokens}, answer included")
        by_room.setdefault(min(room, max_new_tokens), []).append(i)
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for room, rows in by_room.items():
            decoded = greedy_decode(
                model.base,
                [prompts[i] for i in rows],
                max_new_tokens=room,
                stop_ids=model.base.config.eos_token_ids,
                weights=weights,
                on_finished=on_finished,
            )
            for i, answer in zip(rows, decoded, strict=True):
                answers[i] = answer
    finally:
        model.train(was_training)
    return answers


def predict_texts(
    model: AnyModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    on_finished: Callable[[int], None] | None = None,
) -> list[str]:
    """`predict_tokens` on texts."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    answers = predict_tokens(model, encoded, max_new_tokens=max_new_tokens, on_finished=on_finished)
    return [tokenizer.decode(answer) for answer in answers]


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether both are equal after stripping white space."""
    return prediction.strip() == reference.strip()
