"""TensorBoard event files, one for each start of a run, in TensorFlow's record format.

A file is a row of records, each its length, the length's checksum, an `Event` message (tensorflow's event.proto) and
the message's checksum. Scalars need five fields, so no library is used.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_table_entry(byte) for byte in range(256)]


class EventFile:
    """Appends scalars. folder: of the run; made when it is missing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.quiver"
        self._append(_field(3, b"brain.Event:2"))  # file_version

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of a step."""
        values = b"".join(
            _field(1, _field(1, name.encode()) + _key(2, 5) + struct.pack("<f", value))  # Value: tag, simple_value
            for name, value in scalars.items()
        )
        self._append(_key(2, 0) + _varint(step) + _field(5, values))  # step, summary

    def _append(self, fields: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + fields  # wall_time
        length = struct.pack("<Q", len(event))
        with self._path.open("ab") as file:
            file.write(length + _masked_checksum(length) + event + _masked_checksum(event))


def crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _TABLE[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _masked_checksum(data: bytes) -> bytes:
    """The CRC as TensorFlow masks it: rotated by 15 bits plus a constant."""
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _key(number: int, wire_type: int) -> bytes:
    return bytes([number << 3 | wire_type])


def _field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
