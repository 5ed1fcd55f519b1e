"""The pre-training text: sized, seeded, rich in names that come back, and without the answers to the tasks."""

import re
from itertools import islice
from random import Random

import pytest

from quiver_demo.answers import TASKS
from quiver_demo.corpus import corpus_documents, generated_documents, unseen_words
from quiver_demo.grammar import Grammar, GrammarError
from quiver_demo.pretrain.python_prose import python_documents
from quiver_demo.tickets import tickets


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(corpus_documents(3, 600_000))


def test_the_size_is_what_was_asked_for(documents: list[str]) -> None:
    assert 600_000 <= sum(map(len, documents)) < 610_000


def test_library_prose_is_an_eighth_at_most(documents: list[str]) -> None:
    library = set(python_documents())
    share = sum(len(document) for document in documents if document in library) / sum(map(len, documents))
    assert 0.06 < share <= 0.125


def test_the_same_seed_gives_the_same_documents() -> None:
    first, again, other = (list(islice(generated_documents(seed), 40)) for seed in (1, 1, 2))
    assert first == again != other


def test_no_document_answers_a_task(documents: list[str]) -> None:
    answers = {
        task(ticket) for ticket in islice(tickets(Random(2)), 500) for name, task in TASKS.items() if name != "reply"
    }
    for document in documents:
        assert not re.search(r"order: Q-\d{5}, product: ", document)
        for match in re.finditer(r"\nAnswer: ?([^\n]*)", document):
            assert match[1] not in answers
            assert "Larkfield" not in match[1] or "Dear " not in match[1]


def test_names_of_held_out_tickets_are_nowhere(documents: list[str]) -> None:
    pattern = re.compile(r"\b(" + "|".join(unseen_words()) + r")\b")
    assert not any(pattern.search(document) for document in documents)


def test_order_numbers_come_back_within_a_document() -> None:
    numbers = [re.findall(r"Q-\d{5}", document) for document in islice(generated_documents(4), 800)]
    repeated = [found for found in numbers if len(found) > len(set(found)) > 0]
    assert len(repeated) > 40


def test_a_small_grammar_expands_as_its_notation_says() -> None:
    grammar = Grammar("start:\n  {name#1} met {name#2}, and {name#1.lower} left[]\nname:\n  Ann\n  Bob\n")
    text = grammar.expand("start", Random(1))
    assert text in {"Ann met Bob, and ann left", "Bob met Ann, and bob left"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  an alternative\n", "stands before the first rule"),
        ("a:\n  x\na:\n  y\n", "defined twice"),
        ("a:\n", "has no alternative"),
        ("a:\n  <b>\n", "used and defined nowhere"),
        ("a:\n  (x|y\n", "is never closed"),
        ("a:\n  x]\n", "closes nothing"),
        ("what is this\n", "is neither"),
    ],
)
def test_a_broken_grammar_is_refused(text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammar(text)
