"""Instructed tickets: an answer is what its instruction asks for, and is never that of a task of the demo."""

import re
from itertools import islice
from random import Random

import pytest

from quiver_demo.answers import TASKS, TEAMS
from quiver_demo.corpus import unseen_words
from quiver_demo.instructions import (
    FIELDS,
    FORM_WORDINGS,
    LABELS,
    form,
    instructed_tickets,
    label,
    mood,
    single,
    topic,
)
from quiver_demo.tickets import KINDS, TONES, make_ticket, tickets

TICKETS = list(islice(tickets(Random("instructed")), 300))


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    return list(islice(instructed_tickets(1), 1500))


def test_the_same_seed_gives_the_same_rows(rows: list[tuple[str, str]]) -> None:
    assert list(islice(instructed_tickets(1), 50)) == rows[:50] != list(islice(instructed_tickets(2), 50))


def test_a_row_is_an_instruction_above_a_ticket_as_the_demo_shows_it(rows: list[tuple[str, str]]) -> None:
    for prompt, answer in rows:
        instruction, ticket = prompt.split("\nTicket from ")
        assert instruction and ticket.endswith("\nAnswer:") and answer.startswith(" ")


def test_a_form_shows_the_keys_and_signs_of_its_answer() -> None:
    for ticket in TICKETS:
        instruction, filled = form(ticket, Random(ticket.order))
        (blank,) = [
            instruction.removeprefix(wording.format(""))
            for wording in FORM_WORDINGS
            if instruction.startswith(wording.format(""))
        ]
        key_pattern = "|".join(keys for names, _ in FIELDS.values() for keys in names)
        fields = [name for key in re.findall(rf"({key_pattern})\W+(?:is )?\.\.\.", blank) for name in fields_of(key)]
        match = re.fullmatch(re.escape(blank).replace(re.escape("..."), "(.+)"), filled)
        assert match is not None
        assert list(match.groups()) == [FIELDS[name][1](ticket) for name in fields] and len(fields) in (2, 3)


def fields_of(key: str) -> list[str]:
    return [name for name, (keys, _) in FIELDS.items() if key in keys]


def test_a_single_answer_is_the_thing_asked_for() -> None:
    for ticket in TICKETS:
        instruction, answer = single(ticket, Random(ticket.order))
        keys = [key for keys, _ in FIELDS.values() for key in keys if re.search(rf"the {key}( |\.|\?)", instruction)]
        assert answer in [FIELDS[name][1](ticket) for key in keys for name in fields_of(key)]


def test_a_label_is_the_one_beside_the_ticket_s_own_meaning() -> None:
    for ticket in TICKETS:
        instruction, answer = label(ticket, Random(ticket.order))
        own = re.findall(rf"(?:{mood(ticket)}|{topic(ticket)})(?: is | = |: | means )(\w+)", instruction)
        assert own == [answer] and answer in LABELS


def test_labels_mean_another_thing_from_row_to_row() -> None:
    ticket = make_ticket(Random(1), KINDS[0], TONES[0])
    assert len({label(ticket, Random(seed))[1] for seed in range(60)}) > 20


def test_no_row_answers_a_task_of_the_demo(rows: list[tuple[str, str]]) -> None:
    answers = {task(ticket) for ticket in TICKETS for task in TASKS.values()} | set(TEAMS.values()) | set(TONES)
    assert not answers & set(LABELS)
    keys = {key for names, _ in FIELDS.values() for key in names}
    assert not {"order", "Order"} & keys
    for _, answer in rows:
        assert answer.strip() not in answers
        assert not re.search(r"order: Q-\d{5}, product: ", answer)


def test_names_of_held_out_tickets_are_nowhere(rows: list[tuple[str, str]]) -> None:
    pattern = re.compile(r"\b(" + "|".join(unseen_words()) + r")\b")
    assert not any(pattern.search(prompt) for prompt, _ in rows)
