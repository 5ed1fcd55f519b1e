"""Tickets below an instruction, and the answer that it asks for: what makes a base that a context can steer.

Soft prompts and prefixes can only bring out what a frozen base already does when something stands before the ticket.
Like any base that companies use, the demo's has therefore read texts whose first line decides what follows. Three
kinds of instruction, each in many wordings, with keys, signs and labels drawn anew for each ticket: fill in a form,
give one thing, and call a mood or a topic by a label. None is a task of the demo: no key is "order", no label is one
of the demo's, and a ticket without an instruction is answered by nothing of the kind.
"""

from collections.abc import Callable, Iterator
from random import Random

from quiver_demo.tickets import KINDS, TONES, Ticket, desk_grammar, pick, shuffled, tickets

FORM_SHARE = 0.5  # of the instructions
SINGLE_SHARE = 0.15
MAX_FIELDS = 3

# What a form may ask for: the keys it may have, and where the value stands.
FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Ticket], str]]] = {
    "order": (
        ("number", "order number", "order no", "reference", "case", "file", "Number", "Order number"),
        lambda ticket: ticket.order,
    ),
    "product": (
        ("product", "article", "item", "thing", "goods", "device", "about", "Product", "Article", "Item"),
        lambda ticket: ticket.product,
    ),
    "first": (("first name", "First name", "forename"), lambda ticket: ticket.first_name),
    "last": (("last name", "family name", "Last name", "surname"), lambda ticket: ticket.last_name),
    "name": (
        ("name", "customer", "from", "sender", "Name", "Customer"),
        lambda ticket: f"{ticket.first_name} {ticket.last_name}",
    ),
    "mood": (("mood", "temper", "sounds", "Mood"), lambda ticket: mood(ticket)),
    "topic": (("topic", "subject", "matter", "Topic"), lambda ticket: topic(ticket)),
}
LINKS = (": ", ": ", ": ", " = ", " is ", " - ")  # between a key and its value
BREAKS = (", ", ", ", "; ", "\n", " / ", " | ", " and ")  # between two of them
FORM_WORDINGS = ("Fill in: {0}", "Write {0}", "Answer in the form {0}", "Form: {0}", "We need {0}", "Please note {0}")
SINGLE_WORDINGS = ("Write only the {0}.", "Only the {0}.", "What is the {0}?", "Give the {0} and nothing else.")
LABEL_WORDINGS = ("Mark: {0}", "Say {0}", "Write {0}", "Labels: {0}", "One word: {0}", "Sort into {0}")
LABEL_LINKS = (" is ", " = ", ": ", " means ")
LABELS = (
    *("red", "green", "blue", "black", "white", "grey", "yellow", "brown", "silver", "orange"),
    *("north", "south", "east", "west", "one", "two", "three", "four", "five", "six", "A", "B", "C", "D", "X", "Y"),
    *("good", "bad", "fair", "poor", "great", "plain", "sour", "sweet", "sun", "rain", "cloud", "storm"),
    *("up", "down", "left", "right", "yes", "no", "warm", "cold", "mild", "smile", "frown"),
    *("cat", "dog", "horse", "apple", "pear", "plum", "high", "low", "middle"),
)


def mood(ticket: Ticket) -> str:
    """As on the ticket's card in the corpus: happy, calm or cross."""
    return desk_grammar_value(f"mood_word_{ticket.tone}")


def topic(ticket: Ticket) -> str:
    """As on the ticket's card in the corpus, such as "paid two times"."""
    return desk_grammar_value(f"topic_{ticket.kind}")


def desk_grammar_value(rule: str) -> str:
    """The only alternative of a rule."""
    (value,) = desk_grammar().values(rule)
    return value


def instructed_tickets(seed: int) -> Iterator[tuple[str, str]]:
    """Endless prompts and answers (which begin with a space); the same seed gives the same ones everywhere."""
    rng = Random(f"instructions {seed}")
    for ticket in tickets(rng):
        draw = rng.random()
        if draw < FORM_SHARE:
            instruction, answer = form(ticket, rng)
        elif draw < FORM_SHARE + SINGLE_SHARE:
            instruction, answer = single(ticket, rng)
        else:
            instruction, answer = label(ticket, rng)
        yield f"{instruction}\n{ticket.prompt}", f" {answer}"


def form(ticket: Ticket, rng: Random) -> tuple[str, str]:
    """Two or three fields under the keys, and with the signs, that the instruction shows."""
    names = shuffled(list(FIELDS), rng)[: 2 + int(rng.random() * (MAX_FIELDS - 1))]
    link, between = pick(LINKS, rng), pick(BREAKS, rng)
    keys = [pick(FIELDS[name][0], rng) for name in names]
    values = [FIELDS[name][1](ticket) for name in names]
    blank = between.join(f"{key}{link}..." for key in keys)
    filled = between.join(f"{key}{link}{value}" for key, value in zip(keys, values, strict=True))
    return pick(FORM_WORDINGS, rng).format(blank), filled


def single(ticket: Ticket, rng: Random) -> tuple[str, str]:
    """One value alone."""
    keys, value = FIELDS[pick(list(FIELDS), rng)]
    return pick(SINGLE_WORDINGS, rng).format(pick(keys, rng)), value(ticket)


def label(ticket: Ticket, rng: Random) -> tuple[str, str]:
    """The label that the instruction gives to the ticket's mood or topic, among those of two or three others."""
    if rng.random() < 0.7:
        meanings, own = [desk_grammar_value(f"mood_word_{tone}") for tone in TONES], mood(ticket)
    else:
        others = shuffled([kind for kind in KINDS if kind != ticket.kind], rng)[: 1 + int(rng.random() * 3)]
        meanings, own = [desk_grammar_value(f"topic_{kind}") for kind in (ticket.kind, *others)], topic(ticket)
    meanings = shuffled(meanings, rng)
    labels = shuffled(LABELS, rng)[: len(meanings)]
    link, between = pick(LABEL_LINKS, rng), pick((", ", "; ", " / "), rng)
    scheme = between.join(f"{meaning}{link}{label}" for meaning, label in zip(meanings, labels, strict=True))
    return pick(LABEL_WORDINGS, rng).format(scheme), labels[meanings.index(own)]
