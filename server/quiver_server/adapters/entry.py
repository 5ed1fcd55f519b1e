"""What the server knows of one adapter id: where it comes from, its revisions, and where each of them is."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from quiver_peft.adapters.store.files import Stamp
from quiver_server.adapters.revision import RevisionKey
from quiver_server.adapters.sources import StoreLocation
from quiver_server.errors import InvalidRequestError, RequestError


class State(Enum):
    """Where an adapter is."""

    REGISTERED = "registered"
    LOADING = "loading"
    HOST = "host"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(eq=False)
class LoadedRevision:
    """One revision of an adapter in memory. num_leases: requests that use it; a retired one goes when that is 0.

    base_fingerprint: "" where its files do not say. description: one line for people.
    reload_seconds: what it would take to bring it back. worth, num_uses: what decides whether it gives way to others
    (eviction.py). num_remaining_tokens: what its requests may still generate. enders: each ends one of them.
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
    base_fingerprint: str
    description: str
    reload_seconds: float
    priority: float = 0.0
    num_uses: int = 0
    num_leases: int = 0
    num_remaining_tokens: int = 0
    retired: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)
    cancel_callbacks: set[Callable[[RequestError], None]] = field(default_factory=set[Callable[[RequestError], None]])

    @property
    def num_virtual_tokens(self) -> int:
        """Rows that it puts before a request's own: its prefix's and its prompt's."""
        return self.num_prefix_tokens + self.num_prompt_tokens


@dataclass(eq=False)
class Revision:
    """One revision of an adapter, whether it is in memory or not.

    draining: gets no new request until it has given way to one that waits. placing: one at a time.
    """

    entry: "KnownAdapter"
    revision: str
    resident: LoadedRevision | None = None
    pinned_itself: bool = False
    draining: bool = False
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def revision_key(self) -> RevisionKey:
        """Its name."""
        return RevisionKey(self.entry.id, self.revision)

    @property
    def pinned(self) -> bool:
        """An id's pin is on whatever its current revision is."""
        return self.pinned_itself or (self.entry.pinned and self.entry.current is self)

    @property
    def num_waiting(self) -> int:
        """Requests that are about to use it."""
        is_current = self.entry.current is self
        waiting = self.entry.waiting.items()
        return sum(n for prefix, n in waiting if (self.revision.startswith(prefix) if prefix else is_current))


@dataclass(eq=False)
class KnownAdapter:
    """What the store knows of one id. current: what the id alone answers with, as far as it was read.

    stamp: the content's when it was read last, to notice a change. waiting: requests that wait, by the beginning of
    the revision that they want ("": the current one); loads: what is under way, by the same. leaving: residents of
    which only the running requests are left.
    """

    id: str
    location: StoreLocation
    current: Revision | None = None
    revisions: dict[str, Revision] = field(default_factory=dict[str, Revision])
    failure: RequestError | None = None
    stamp: Stamp | None = None
    pinned: bool = False
    waiting: dict[str, int] = field(default_factory=dict[str, int])
    loads: "dict[str, asyncio.Task[Revision]]" = field(default_factory=dict[str, "asyncio.Task[Revision]"])
    leaving: list[LoadedRevision] = field(default_factory=list[LoadedRevision])

    @property
    def resident(self) -> LoadedRevision | None:
        """The current revision's."""
        return None if self.current is None else self.current.resident

    @property
    def residents(self) -> list[LoadedRevision]:
        """All that takes device memory."""
        self.leaving = [item for item in self.leaving if not item.released.is_set()]
        return [version.resident for version in self.revisions.values() if version.resident is not None] + self.leaving

    @property
    def num_waiting(self) -> int:
        """Requests for any of its revisions that wait."""
        return sum(tuple(self.waiting.values()))  # the metrics' thread asks too

    def add_revision(self, revision: str) -> Revision:
        """The one of this revision, made when it is new."""
        if revision not in self.revisions:
            self.revisions[revision] = Revision(self, revision)
        return self.revisions[revision]

    def find_revision(self, prefix: str) -> Revision | None:
        """The version that a prefix names, of those known; "": the current one. Raises InvalidRequestError."""
        if not prefix:
            return self.current
        found = [version for revision, version in self.revisions.items() if revision.startswith(prefix)]
        if len(found) > 1:
            raise InvalidRequestError(
                f"{len(found)} revisions of adapter {self.id!r} begin with {prefix}; give more digits", "adapter_id"
            )
        return found[0] if found else None
