"""The support-desk data set: the same everywhere, balanced, disjoint, and readable without doubt."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from quiver_demo.answers import CLOSINGS, OPENINGS, REMEDIES, TASKS, TEAMS, URGENCY
from quiver_demo.dataset import make_splits, write_dataset
from quiver_demo.tickets import KINDS, MAX_WORDS, MIN_WORDS, TONES, Ticket, desk_grammar, tickets

SIZES = {"train": 420, "validation": 42, "held_out": 84}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Ticket]]:
    return make_splits(5, SIZES)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, seed=3, train=20, validation=5, held_out=5)
    write_dataset(tmp_path / "other", seed=4, train=20, validation=5, held_out=5)
    contents = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.jsonl"))]
        for name in ("one", "two", "other")
    }
    assert contents["one"] == contents["two"] != contents["other"]


def test_a_ticket_is_pinned_across_versions_of_python() -> None:
    texts = "\0".join(ticket.prompt for ticket in islice(tickets(Random("pin")), 50))
    assert hashlib.sha256(texts.encode()).hexdigest() == PINNED_TICKETS


def test_every_file_has_its_rows_and_the_same_prompts(tmp_path: Path) -> None:
    write_dataset(tmp_path, seed=3, train=20, validation=5, held_out=7)
    for split, size in (("train", 20), ("validation", 5), ("held_out", 7)):
        prompts: set[tuple[str, ...]] = set()
        for task in TASKS:
            rows = [json.loads(line) for line in (tmp_path / task / f"{split}.jsonl").read_text().splitlines()]
            assert len(rows) == size
            assert all(row["completion"].startswith(" ") and row["prompt"].endswith("\nAnswer:") for row in rows)
            prompts.add(tuple(row["prompt"] for row in rows))
        assert len(prompts) == 1


def test_no_prompt_is_in_two_splits(splits: dict[str, list[Ticket]]) -> None:
    prompts = [ticket.prompt for split in splits.values() for ticket in split]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())


def test_kinds_and_tones_are_balanced(splits: dict[str, list[Ticket]]) -> None:
    counts = Counter((ticket.kind, ticket.tone) for ticket in splits["train"])
    assert set(counts) == {(kind, tone) for kind in KINDS for tone in TONES}
    assert max(counts.values()) <= min(counts.values()) + 1


def test_only_held_out_tickets_name_what_training_never_shows(splits: dict[str, list[Ticket]]) -> None:
    unseen = {rule: set(desk_grammar().values(f"{rule}_unseen")) for rule in ("first_name", "last_name", "catalogue")}

    def hits(ticket: Ticket) -> bool:
        return (
            ticket.first_name in unseen["first_name"]
            or ticket.last_name in unseen["last_name"]
            or ticket.product in unseen["catalogue"]
        )

    assert not any(hits(ticket) for split in ("train", "validation") for ticket in splits[split])
    share = sum(hits(ticket) for ticket in splits["held_out"]) / SIZES["held_out"]
    assert 0 < share < 0.2


def test_a_ticket_says_what_its_answers_need(splits: dict[str, list[Ticket]]) -> None:
    for ticket in splits["train"]:
        assert ticket.order in ticket.message and re.fullmatch(r"Q-\d{5}", ticket.order)
        assert ticket.product in ticket.message
        assert ticket.prompt.startswith(f"Ticket from {ticket.first_name} {ticket.last_name}\n")
        assert MIN_WORDS <= len(ticket.message.split()) <= MAX_WORDS
        assert len(set(re.findall(r"Q-\d{5}", ticket.message))) == 1


def test_answers_follow_from_the_ticket(splits: dict[str, list[Ticket]]) -> None:
    for ticket in splits["held_out"]:
        assert TASKS["routing"](ticket) == TEAMS[ticket.kind]
        assert TASKS["extract"](ticket) == f"order: {ticket.order}, product: {ticket.product}"
        assert TASKS["sentiment"](ticket) == ticket.tone
        reply = TASKS["reply"](ticket)
        assert reply.startswith(f"Dear {ticket.first_name}, {OPENINGS[ticket.tone]} ")
        assert reply.endswith(CLOSINGS[ticket.tone]) and ticket.product in reply
        assert TASKS["priority"](ticket) in {"P1", "P2", "P3"}


def test_the_same_words_never_mean_two_things() -> None:
    by_message: dict[str, set[tuple[str, str]]] = {}
    for ticket in islice(tickets(Random(1)), 3000):
        by_message.setdefault(ticket.message, set()).add((ticket.kind, ticket.tone))
    assert all(len(meanings) == 1 for meanings in by_message.values())


def test_every_kind_has_team_remedy_and_urgency() -> None:
    assert set(KINDS) == set(TEAMS) == set(REMEDIES) == set(URGENCY)
    assert set(TONES) == set(OPENINGS) == set(CLOSINGS)
    assert len(set(TEAMS.values())) == 7


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train is -1; the number of rows must be 0 or more"):
        write_dataset(tmp_path, train=-1)


def test_the_command_line_writes_the_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quiver_demo.dataset", str(tmp_path), "--train", "3", "--validation", "1"]
    result = subprocess.run([*command, "--held-out", "2"], capture_output=True, text=True, check=True)
    assert "wrote 5 tasks" in result.stdout
    assert len((tmp_path / "reply" / "train.jsonl").read_text().splitlines()) == 3


PINNED_TICKETS = "0eedf5cc5dcdabd82146ef3ecbc58f3f9a6de4ef6975c9e7bf968286f25cc431"
