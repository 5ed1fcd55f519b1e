"""Which sequences run in the next step, and with how many tokens. No torch here."""

from collections import deque
from dataclasses import dataclass

from quiver_server.blocks import BlockPool
from quiver_server.request import Sequence


@dataclass(frozen=True)
class ScheduledChunk:
    """`num_new_tokens` tokens of a sequence, from its first uncached one on."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def num_new_source_tokens(self) -> int:
        """Tokens of its source, all or none, that an encoder reads before."""
        return 0 if self.sequence.source_is_cached else self.sequence.num_source_tokens

    @property
    def completes(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be drawn."""
        return self.sequence.num_cached_tokens + self.num_new_tokens == self.sequence.num_tokens


class Scheduler:
    """First come, first served, within a budget of tokens per step, rows, and cache blocks.

    Running sequences come first, so that long prompts, cut into chunks, hold nobody up. When blocks run out, the
    newest running sequence steps back and is computed again later. Sources, which cannot be cut, have a budget of the
    same size to themselves: no row that is running can keep them waiting.

    A new sequence starts behind what the cache already holds of it. Where another's chunk computes in this step what
    it needs next, it waits for that: candidates of one request compute their prompt once.
    """

    def __init__(self, blocks: BlockPool, max_running: int, max_step_tokens: int) -> None:
        self._blocks = blocks
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._computing: set[bytes] = set()  # names of the blocks that the step being planned will fill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits for its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended or was cancelled: its place and its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._blocks.release(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks, ordered by adapter slot so that rows of one adapter lie together."""
        budget = self._max_step_tokens
        self._computing.clear()
        chunks: list[ScheduledChunk] = []
        num_waiting = len(self.waiting)
        for sequence in list(self.running):
            if budget and sequence in self.running and self._make_room(sequence, budget):
                chunks.append(self._take(sequence, budget))
                budget -= chunks[-1].num_new_tokens
        if len(self.waiting) > num_waiting:  # someone stepped back: there is no room for anybody new
            chunks = [chunk for chunk in chunks if chunk.sequence in self.running]
            return sorted(chunks, key=lambda chunk: chunk.sequence.slot)
        source_budget = self._max_step_tokens
        for sequence in list(self.waiting):
            if not budget or len(self.running) == self._max_running:
                break
            self._blocks.reuse(sequence)
            chunk_end = self._chunk_end(sequence, budget)
            num_source_tokens = 0 if sequence.source_is_cached else sequence.num_source_tokens
            if num_source_tokens > source_budget or not self._blocks.can_extend(sequence, chunk_end):
                self._blocks.release(sequence)
                break
            if self._blocks.next_key(sequence) in self._computing:
                self._blocks.release(sequence)
                continue
            self.waiting.remove(sequence)
            self.running.append(sequence)
            source_budget -= num_source_tokens
            chunks.append(self._take(sequence, budget))
            budget -= chunks[-1].num_new_tokens
        return sorted(chunks, key=lambda chunk: chunk.sequence.slot)

    def note_computed(self, chunk: ScheduledChunk) -> None:
        """A chunk has been computed: its keys and values are in the cache, and its full blocks can be shared."""
        sequence = chunk.sequence
        sequence.num_cached_tokens += chunk.num_new_tokens
        sequence.source_is_cached = True
        self._blocks.name_full_blocks(sequence)

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        return min(sequence.num_tokens, sequence.num_cached_tokens + budget)

    def _take(self, sequence: Sequence, budget: int) -> ScheduledChunk:
        end = self._chunk_end(sequence, budget)
        self._blocks.extend(sequence, end)
        chunk = ScheduledChunk(sequence, end - sequence.num_cached_tokens)
        self._computing.update(self._blocks.keys_of_chunk(sequence, chunk.num_new_tokens))
        return chunk

    def _make_room(self, sequence: Sequence, budget: int) -> bool:
        """Free blocks for the sequence's next chunk, taking them from newer ones; False when it stepped back itself."""
        while not self._blocks.can_extend(sequence, self._chunk_end(sequence, budget)):
            newest = self.running.pop()
            self._blocks.release(newest)
            self.waiting.appendleft(newest)
            if newest is sequence:
                return False
        return True
