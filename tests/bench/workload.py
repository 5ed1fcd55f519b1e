"""The requests of a measurement: made from a seed, kept as a file, so that every rival answers the same ones."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MIN_PROMPT_TOKENS = 32
MAX_PROMPT_TOKENS = 256
FIRST_TOKEN_ID = 3  # those before are special


@dataclass(frozen=True)
class Request:
    """One prompt of random ids. adapter: its id; "" is the base."""

    prompt: tuple[int, ...]
    adapter: str
    max_new_tokens: int


def make_requests(
    seed: str, count: int, adapters: Sequence[str], vocab_size: int, max_new_tokens: int
) -> list[Request]:
    """Requests of uniformly drawn lengths. adapters: dealt out in shuffled rounds, none again before all had a turn.

    Prompts of different seeds have nothing in common, so that no prefix cache helps from one run to the next.
    """
    draw = random.Random(seed)
    deck: list[str] = []
    requests: list[Request] = []
    for _ in range(count):
        if not deck:
            deck = draw.sample(list(adapters), len(adapters)) if adapters else [""]
        length = draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
        prompt = tuple(draw.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(length))
        requests.append(Request(prompt, deck.pop(), max_new_tokens))
    return requests


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """As a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(request) for request in requests]))


def read_requests(path: Path) -> list[Request]:
    """What `write_requests` wrote."""
    rows = json.loads(path.read_text())
    return [Request(tuple(row["prompt"]), row["adapter"], row["max_new_tokens"]) for row in rows]
