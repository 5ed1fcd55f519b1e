"""What the store knows of one adapter id: its folder, its state, the revision in memory."""

import asyncio
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from quiver_peft.adapters.adapter_files import READ_FILES
from quiver_peft.file_state import FileState, file_state
from quiver_server.errors import RequestError

FilesState = tuple[FileState, ...]
ADAPTER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class State(Enum):
    """Where an adapter is."""

    REGISTERED = "registered"
    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(eq=False)
class Resident:
    """One revision of an adapter in memory. num_leases: requests that use it; a retired one goes when that is 0.

    reload_seconds: what it would take to bring it back. worth, num_uses: what decides whether it gives way to others
    (eviction.py). num_remaining_tokens: what its requests may still generate.
    """

    id: str
    revision: str
    methods: tuple[str, ...]
    slot: int
    num_bytes: int
    num_parameters: int
    max_rank: int
    num_prefix_tokens: int
    num_prompt_tokens: int
    reload_seconds: float
    worth: float = 0.0
    num_uses: int = 0
    num_leases: int = 0
    num_remaining_tokens: int = 0
    retired: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_virtual_tokens(self) -> int:
        """Rows that it puts before a request's own: its prefix's and its prompt's."""
        return self.num_prefix_tokens + self.num_prompt_tokens


@dataclass(eq=False)
class Entry:
    """What the store knows of one id. `seen`: the files' state at the last load, to notice a change.

    draining: gets no new request until it has given way to one that waits.
    """

    id: str
    folder: Path
    resident: Resident | None = None
    loading: "asyncio.Task[Resident] | None" = None
    failure: RequestError | None = None
    seen: FilesState = ()
    pinned: bool = False
    draining: bool = False
    num_waiting: int = 0

    @property
    def state(self) -> State:
        """As the wire calls it."""
        if self.resident is not None:
            return State.RESIDENT
        if self.loading is not None:
            return State.LOADING
        return State.REGISTERED if self.failure is None else State.FAILED


def files_state(folder: Path) -> FilesState:
    """Size, times and number of an adapter's files: what tells that they were replaced."""
    paths = (folder / name for name in READ_FILES)
    return tuple(file_state(path) for path in paths if path.is_file())
