"""Questions whose answers Hugging Face gave beforehand, each prompt alone; and asking them of a running server."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from support.live_server import answer_tokens
from support.tiny import random_tokens

from quiver import Client


class Oracle(Protocol):
    """Whoever knows what an adapter answers when it is asked alone."""

    def expected(self, adapter_id: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy answer, its end token left out."""
        ...


class Question(NamedTuple):
    """A request and its right answer."""

    adapter_id: str
    prompt: tuple[int, ...]
    num_tokens: int
    answer: tuple[int, ...]


def make_questions(bench: Oracle, names: Sequence[str], number: int, seed: int = 0) -> list[Question]:
    """So many, every adapter in turn; prompts of 1 to 40 tokens, answers of 1 to 16."""
    draw = random.Random(seed)
    questions: list[Question] = []
    for i in range(number):
        name, num_tokens = names[i % len(names)], draw.randint(1, 16)
        prompt = random_tokens(draw.choice([1, 5, 16, 17, 40]), seed=seed + i).tolist()
        questions.append(Question(name, tuple(prompt), num_tokens, tuple(bench.expected(name, prompt, num_tokens))))
    return questions


def answer_of(client: Client, question: Question, names: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """What a server says. names: other names under which it knows the adapters."""
    adapter_id = (names or {}).get(question.adapter_id, question.adapter_id)
    answer = client.generate(question.prompt, adapter=adapter_id, max_new_tokens=question.num_tokens)
    return tuple(answer_tokens(answer))
