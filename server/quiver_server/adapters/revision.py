"""How an adapter's revision is named: `id@revision`, whole or by its first digits."""

import re
from typing import NamedTuple

from quiver_peft.adapters.store.store import ADAPTER_ID
from quiver_server.errors import InvalidRequestError


class RevisionKey(NamedTuple):
    """One revision of one adapter."""

    id: str
    revision: str

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}"


MIN_REVISION_DIGITS = 6  # of "id@revision"; `GenerateRequest.adapter_id` in the contract says so too
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_REVISION_DIGITS},64}}")


def parse_name(name: str, field_name: str = "adapter_id") -> tuple[str, str]:
    """The id of "id" or "id@revision", and the revision's first digits or "". Raises InvalidRequestError."""
    adapter_id, at, prefix = name.partition("@")
    if not ADAPTER_ID.fullmatch(adapter_id):
        raise InvalidRequestError(
            f"{field_name} {adapter_id!r} is malformed: 1 to 128 letters, digits, '.', '_', '-', not first a '.'",
            field_name,
        )
    if at and not _PREFIX.fullmatch(prefix):
        raise InvalidRequestError(
            f"revision {prefix!r} is malformed: {MIN_REVISION_DIGITS} to 64 hexadecimal digits", field_name
        )
    return adapter_id, prefix
