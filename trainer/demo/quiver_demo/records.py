"""Documents of records: the same facts as JSON, table, list and sentence, so that exact copying is learned.

They are about stock, staff, stores and the like; none has the two keys of the task `extract`.
"""

import json
from collections.abc import Sequence
from random import Random

from quiver_demo.grammar import Grammar
from quiver_demo.tickets import pick, shuffled

# Field -> the rule of the grammar that its values come from; a theme is what one record may hold.
THEMES: dict[str, dict[str, str]] = {
    "stock": {"item": "product", "shelf": "code", "count": "many", "colour": "colour", "material": "material"},
    "staff": {"name": "person", "trade": "trade", "town": "town", "phone": "phone", "room": "room"},
    "store": {"town": "town", "street": "street", "manager": "person", "opens": "hour", "code": "code"},
    "delivery": {"parcel": "code", "carrier": "carrier", "day": "day", "customer": "person", "town": "town"},
    "repair": {"device": "product", "number": "order", "part": "part", "worker": "colleague", "ready": "day"},
    "visit": {"guest": "person", "from": "town", "month": "month", "gift": "object", "pet": "pet"},
    "offer": {"article": "product", "price": "price", "until": "date", "company": "company"},
    "test": {"word": "made", "code": "code", "colour": "colour", "number": "order", "letter": "letter"},
}

Record = dict[str, str]


def record_document(grammar: Grammar, rng: Random) -> str:
    """One to four records of one theme in two or three forms, each form headed or separated by a blank line."""
    theme = pick(list(THEMES), rng)
    num_fields = 2 + int(rng.random() * 3)
    fields = shuffled(list(THEMES[theme]), rng)[:num_fields]
    num_records = 1 + int(rng.random() * 4)
    records = [{field: grammar.expand(THEMES[theme][field], rng) for field in fields} for _ in range(num_records)]
    forms = shuffled([_as_json, _as_table, _as_list, _as_sentences, _as_questions], rng)[: 2 + int(rng.random() * 2)]
    heading = pick(
        ["", f"{theme.capitalize()}\n\n", f"{theme.capitalize()} records\n\n", f"From the {theme} book\n\n"], rng
    )
    return heading + "\n\n".join(form(records, rng) for form in forms)


def _as_json(records: Sequence[Record], rng: Random) -> str:
    """One object a line, or all in one array."""
    if rng.random() < 0.3:
        return json.dumps(records, ensure_ascii=False)
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def _as_table(records: Sequence[Record], rng: Random) -> str:
    separator = pick([" | ", ", ", "; ", " - "], rng)
    head = separator.join(records[0])
    return "\n".join([head, *(separator.join(record.values()) for record in records)])


def _as_list(records: Sequence[Record], rng: Random) -> str:
    bullet = pick(["", "- ", "* "], rng)
    blocks = ["\n".join(f"{bullet}{field.capitalize()}: {value}" for field, value in r.items()) for r in records]
    return "\n\n".join(blocks)


def _as_sentences(records: Sequence[Record], rng: Random) -> str:
    """ "The town is Oakford, the street is Mill Lane and the code is B12." for each record."""
    sentences: list[str] = []
    for record in records:
        clauses = [_clause(field, value, rng) for field, value in record.items()]
        sentence = ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)


def _clause(field: str, value: str, rng: Random) -> str:
    return pick([f"the {field} is {value}", f"it has {value} as the {field}", f'"{value}" is the {field}'], rng)


def _as_questions(records: Sequence[Record], rng: Random) -> str:
    """Which value stands next to which."""
    lines: list[str] = []
    for record in shuffled(records, rng)[:2]:
        known, wanted = shuffled(list(record), rng)[:2]
        lines.append(f"Question: What is the {wanted} where the {known} is {record[known]}?")
        lines.append(f"Answer: The {wanted} is {record[wanted]}.")
    return "\n".join(lines)
