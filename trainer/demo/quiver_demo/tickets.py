"""Seeded support tickets of the fictional shop: who writes, about which product and order, what, and in which tone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from random import Random
from typing import TypeVar

from quiver_demo.grammar import Grammar

T = TypeVar("T")

MIN_WORDS = 25
MAX_WORDS = 60
UNSEEN_SHARE = 0.02  # held-out tickets: chance that the first name, last name or product is one no training text has


@dataclass(frozen=True)
class Ticket:
    """One customer's message with everything that decides the answers to it."""

    first_name: str
    last_name: str
    product: str  # as in the catalogue, "Aurora desk lamp"
    order: str  # "Q-" and five digits
    kind: str  # what the customer writes about, one of `KINDS`
    tone: str  # "positive", "neutral" or "negative"
    message: str  # 25 to 60 words of English, one line

    @property
    def header(self) -> str:
        """The line above the message."""
        return f"Ticket from {self.first_name} {self.last_name}"

    @property
    def prompt(self) -> str:
        """The text every task's adapter is asked to continue."""
        return f"{self.header}\n{self.message}\nAnswer:"


@cache
def desk_grammar() -> Grammar:
    """The grammar of the tickets: names and things, issues, tones, and the orders of sentences."""
    folder = files("quiver_demo") / "grammar"
    return Grammar("\n".join((folder / name).read_text("utf-8") for name in ("words.txt", "issues.txt", "tickets.txt")))


KINDS: tuple[str, ...] = tuple(desk_grammar().values("kind"))
TONES: tuple[str, ...] = tuple(desk_grammar().values("tone"))


def pick(values: Sequence[str], rng: Random) -> str:
    """One of `values`; `Random.choice` is not used because its sequence may change between versions of Python."""
    return values[int(rng.random() * len(values))]


def shuffled(values: Sequence[T], rng: Random) -> list[T]:
    """A copy of `values` in random order (Fisher and Yates), from `Random.random` alone."""
    result = list(values)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


def make_ticket(rng: Random, kind: str, tone: str, *, with_unseen: bool = False) -> Ticket:
    """A ticket of that kind and tone; `with_unseen` admits names and products kept out of all training text."""

    def choose(rule: str) -> str:
        unseen = with_unseen and rng.random() < UNSEEN_SHARE
        return pick(desk_grammar().values(f"{rule}_unseen" if unseen else rule), rng)

    first_name, last_name = choose("first_name"), choose("last_name")
    bound = {
        "person#1": f"{first_name} {last_name}",
        "product#1": choose("catalogue"),
        "order#1": desk_grammar().expand("order", rng),
        "kind": kind,
        "tone": tone,
    }
    while True:
        message = desk_grammar().expand("message", rng, bound)
        if MIN_WORDS <= len(message.split()) <= MAX_WORDS:
            return Ticket(first_name, last_name, bound["product#1"], bound["order#1"], kind, tone, message)


def tickets(rng: Random, *, with_unseen: bool = False) -> Iterator[Ticket]:
    """Endless tickets in random order; every 42 in a row hold each kind in each tone once."""
    while True:
        for kind, tone in shuffled(list(product(KINDS, TONES)), rng):
            yield make_ticket(rng, kind, tone, with_unseen=with_unseen)
