"""Damage to messages that stay messages: any field, at any depth, gets another value of its type, mostly extreme."""

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = [0, 1, 2, 16, 17, 20, 21, 127, 128, 319, 320, 321, 2**31 - 1]
_FLOATS = [0.0, -0.0, 1.0, 0.5, 2.0, -2.0, 1e-45, 1e-30, 3e38, -3e38, float("nan"), float("inf"), -float("inf")]
_TEXTS = [
    "", " ", "a", "all-r2", "all-r2@0123456789", "all-r2@", "@", "one-r1", "..", "../x", "/etc", "x" * 129, "\x00",
    "\n", "\N{SNOWMAN}", "é" * 700, "nobody", "one-r1/../all-r2", "file:///x", "the box " * 40, "\ufffd", "<|eos|>",
]  # fmt: skip
_LIMITS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
}


def change_message(message: Message, draw: random.Random) -> None:
    """One to three fields."""
    for _ in range(draw.randint(1, 3)):
        _change_field(message, draw)


def _change_field(message: Message, draw: random.Random) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field: Any = draw.choice(fields)
    if field.is_repeated:
        values: Any = getattr(message, field.name)
        if field.message_type is not None:
            _change_field(draw.choice(values) if values and draw.random() < 0.8 else values.add(), draw)
        else:
            values.extend(_value(field, draw) for _ in range(draw.choice([1, 2, 17, 300])))
    elif field.message_type is not None:
        child: Any = getattr(message, field.name)
        child.SetInParent()
        _change_field(child, draw)
    elif draw.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, draw))


def _value(field: Any, draw: random.Random) -> Any:
    if field.type in _LIMITS:
        return draw.choice([*_INTEGERS, *_LIMITS[field.type]])
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw.choice(field.enum_type.values).number
    return draw.choice(_TEXTS)
