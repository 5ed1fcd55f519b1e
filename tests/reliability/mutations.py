"""Damage: bytes changed, cut, repeated and put in; JSON values replaced by others that parse."""

import json
import random
from typing import Any

# What numbers, lengths and counts in binary formats break at.
_EDGES = [0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x", "LORA",
    "\x00", "../..", "a" * 3000, [], [None], ["q_proj"], [[]], {}, {"": None}, {"q_proj": 2**40}, [0] * 100,
]  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to four small damages."""
    content = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        edge = draw.choice(_EDGES)
        piece = edge.to_bytes(8, draw.choice(["little", "big"]))[-draw.randint(1, 8) :]
        match draw.randrange(6):
            case 0 if place < len(content):
                content[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(content):
                content[place] = draw.randrange(256)
            case 2:
                content[place : place + len(piece)] = piece
            case 3:
                content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
            case 4:
                del content[place : place + draw.randint(1, max(len(content) // 3, 1))]
            case _:
                content[place:place] = content[place : place + draw.randint(1, 40)] * draw.randint(1, 5)
    return bytes(content)


def damaged_json(text: bytes, draw: random.Random) -> bytes:
    """Still JSON: values replaced, keys dropped, renamed and doubled, at any depth."""
    value = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        value = _changed(value, draw)
    return json.dumps(value).encode()


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(k + draw.choice(["x", " ", "\u0000"]) if k == key else k): v for k, v in value.items()}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        place = draw.randrange(len(value))
        return [*value[:place], _changed(value[place], draw), *value[place + draw.randrange(2) :]]
    return draw.choice(_VALUES)
