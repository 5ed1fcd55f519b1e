"""The text the demo's base model is trained on: prose of the Python library and generated English of the shop's world.

The generated part names people, products and numbers again and again, many of them made up on the spot, because a small
model learns to copy unseen strings only from text that is full of them. The answers to the tasks of the support desk
are nowhere in it: those are for the adapters to teach.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from random import Random

from quiver_demo.grammar import Grammar
from quiver_demo.pretrain.python_prose import python_documents
from quiver_demo.records import record_document
from quiver_demo.tickets import desk_grammar, shuffled

DEFAULT_SEED = 2025
DEFAULT_CHARACTERS = 22_000_000
MAX_PYTHON_SHARE = 0.12  # of all characters
MAX_PYTHON_REPEATS = 2
RECORD_SHARE = 0.12  # of the generated documents

_GRAMMAR_FILES = (
    "words.txt",
    "issues.txt",
    "tickets.txt",
    "prose.txt",
    "desk_docs.txt",
    "shop_docs.txt",
    "town_docs.txt",
    "recall_docs.txt",
    "documents.txt",
)


@cache
def corpus_grammar() -> Grammar:
    """The grammar of all generated documents; it includes the grammar of the tickets."""
    folder = files("quiver_demo") / "grammar"
    return Grammar("\n".join((folder / name).read_text("utf-8") for name in _GRAMMAR_FILES))


def unseen_words() -> list[str]:
    """The names that only held-out tickets may have: first names, last names, first words of products."""
    grammar = desk_grammar()
    names = [grammar.values(f"{rule}_unseen") for rule in ("first_name", "last_name", "catalogue")]
    return [value.split()[0] for rule_values in names for value in rule_values]


def generated_documents(seed: int) -> Iterator[str]:
    """Endless generated documents; the same seed gives the same ones on every machine and version of Python."""
    rng = Random(f"corpus {seed}")
    grammar = corpus_grammar()
    unseen = _unseen_pattern()
    while True:
        as_record = rng.random() < RECORD_SHARE
        document = record_document(grammar, rng) if as_record else grammar.expand("document", rng)
        if not unseen.search(document):  # the made-up names could hit one by chance
            yield document


def corpus_documents(seed: int = DEFAULT_SEED, num_characters: int = DEFAULT_CHARACTERS) -> Iterator[str]:
    """Documents of `num_characters` together (the last may go over): library prose spread evenly among generated ones.

    Raises:
        FileNotFoundError: this Python has no standard library in source form.
    """
    prose = _prose(seed, int(num_characters * MAX_PYTHON_SHARE))
    num_prose = sum(len(document) for document in prose)
    num_generated_wanted = max(num_characters - num_prose, 1)
    num_generated = num_prose_given = 0
    waiting = iter(prose)
    for document in generated_documents(seed):
        while num_prose_given * num_generated_wanted < num_generated * num_prose:
            library_document = next(waiting, None)
            if library_document is None:  # all given: the last generated document went over its share
                break
            num_prose_given += len(library_document)
            yield library_document
        if num_generated >= num_generated_wanted:
            return
        num_generated += len(document)
        yield document


def _prose(seed: int, max_characters: int) -> list[str]:
    """Library documents in random order, each at most twice and the second time in another order."""
    rng = Random(f"prose {seed}")
    unseen = _unseen_pattern()
    library = [document for document in python_documents() if not unseen.search(document)]
    chosen: list[str] = []
    for _ in range(MAX_PYTHON_REPEATS):
        for document in shuffled(library, rng):
            max_characters -= len(document)
            if max_characters < 0:
                return chosen
            chosen.append(document)
    return chosen


def _unseen_pattern() -> re.Pattern[str]:
    return re.compile(r"\b(" + "|".join(unseen_words()) + r")\b")
