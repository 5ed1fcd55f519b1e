"""Reads the one message that helm sends as protobuf: the Secret in which it keeps a release."""

import base64
from typing import Any

Fields = list[tuple[int, Any]]


def _fields(data: bytes) -> Fields:
    """A message's (field number, value) in order: varints as int, the rest as bytes."""
    found: Fields = []
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = varint()
        value: Any = varint()
        if tag & 7 == 2:  # a length, and so many bytes
            value, position = data[position : position + value], position + value
        else:
            assert tag & 7 == 0, f"wire type {tag & 7} does not occur in a Secret"
        found.append((tag >> 3, value))
    return found


def _map(fields: Fields, number: int) -> dict[str, bytes]:
    """A map<string, bytes or string>: a repeated message of key (1) and value (2)."""
    entries = [dict(_fields(value)) for field, value in fields if field == number]
    return {entry[1].decode(): entry.get(2, b"") for entry in entries}


def secret_from_protobuf(raw: bytes) -> dict[str, Any]:
    """`raw`: the bytes k8s\\0 and a runtime.Unknown of TypeMeta (1) and the object (2)."""
    unknown = dict(_fields(raw[4:]))
    kind = dict(_fields(unknown[1]))[2].decode()
    assert kind == "Secret", f"a {kind} came as protobuf"
    secret = _fields(unknown[2])
    metadata = _fields(dict(secret)[1])
    labels = {name: value.decode() for name, value in _map(metadata, 11).items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": dict(secret).get(3, b"Opaque").decode(),
        "metadata": {"name": dict(metadata)[1].decode(), "labels": labels},
        "data": {name: base64.b64encode(value).decode() for name, value in _map(secret, 2).items()},
    }
