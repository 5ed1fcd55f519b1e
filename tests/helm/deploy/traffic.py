"""Requests sent through the router for as long as something happens, and what became of each."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from quiver import AsyncClient, QuiverClientError

PROMPT = [9, 20, 31]


@dataclass
class Outcome:
    """One request: when it began (time.monotonic), for whom, the tokens of its stream so far, and its error, if any."""

    began_seconds: float
    adapter: str
    num_tokens: int = 0
    error: QuiverClientError | None = None


@dataclass
class Traffic:
    """What has been sent, and of that what has ended. `stopping`: no more begins."""

    begun: list[Outcome] = field(default_factory=list[Outcome])
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    stopping: bool = False

    @property
    def failed(self) -> list[Outcome]:
        """Those that got an error."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    async def more(self, count: int = 60) -> None:
        """Returns when so many more have ended."""
        wanted = len(self.outcomes) + count
        while len(self.outcomes) < wanted:
            await asyncio.sleep(0.01)

    async def streaming(self, count: int) -> None:
        """Returns when so many have begun and each has had a token."""
        while len(self.begun) < count or not all(outcome.num_tokens for outcome in self.begun):
            await asyncio.sleep(0.001)

    async def send(self, client: AsyncClient, adapter: str, *, stream: bool, num_tokens: int) -> None:
        """One request, to its end."""
        outcome = Outcome(time.monotonic(), adapter)
        self.begun.append(outcome)
        try:
            if stream:
                async for piece in client.stream(PROMPT, adapter=adapter, max_new_tokens=num_tokens, ignore_eos=True):
                    outcome.num_tokens += len(piece.token_ids)
                assert outcome.num_tokens == num_tokens, "a stream ended early without an error"
            else:
                await client.generate(PROMPT, adapter=adapter, max_new_tokens=num_tokens, ignore_eos=True)
        except QuiverClientError as error:
            outcome.error = error
        self.outcomes.append(outcome)


@asynccontextmanager
async def traffic(target: str, adapters: Sequence[str], *, width: int = 8) -> AsyncGenerator[Traffic]:
    """Requests for these adapters in turn, unary and streamed, `width` at a time; at the end all are awaited."""
    sent = Traffic()
    turns = itertools.cycle((adapter, stream) for adapter in adapters for stream in (False, True))

    async def worker(client: AsyncClient) -> None:
        while not sent.stopping:
            adapter, stream = next(turns)
            await sent.send(client, adapter, stream=stream, num_tokens=3)

    async with AsyncClient(target, timeout_seconds=30) as client, asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(worker(client))
        try:
            yield sent
        finally:
            sent.stopping = True
