"""Which sequences run in the next step, and with how many tokens. No torch here."""

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.fair_queue import FairQueue
from quiver_server.engine.sequence import Sequence

PATIENCE_SECONDS = 3.0  # how long anybody may be passed by others
_GENERATED_WEIGHT = 2  # a generated token counts as two of a prompt's: it has a step's share to itself (VTC's weights)


@dataclass(frozen=True)
class ScheduledChunk:
    """`num_new_tokens` tokens of a sequence, from its first uncached one on."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def num_new_encoder_tokens(self) -> int:
        """Tokens of its source, all or none, that an encoder reads before."""
        return 0 if self.sequence.encoder_is_cached else self.sequence.num_encoder_tokens

    @property
    def completes(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be drawn."""
        return self.sequence.num_cached_tokens + self.num_new_tokens == self.sequence.num_tokens


@dataclass
class _Plan:
    """One step while it is being planned; budgets in tokens. computing: names of the blocks that it will fill.

    is_closed: nobody new is admitted any more.
    """

    budget: int
    encoder_budget: int
    chunks: dict[Sequence, ScheduledChunk] = field(default_factory=dict[Sequence, ScheduledChunk])
    computing: set[bytes] = field(default_factory=set[bytes])
    admission_closed: bool = False


class Scheduler:
    """Fair between tenants (the adapters and the base), within a budget of tokens per step, rows, and cache blocks.

    Those that generate come first, one token each, so that prompts hold nobody up. What is left of the budget goes to
    prompts, begun and new, in chunks: always to the tenant that was served least. Sources, which cannot be cut, have a
    budget of the same size to themselves.

    When blocks run out, the newest sequence of the tenant that was served most steps back, and is computed again later
    (what the cache still holds of it is not). The same happens where a tenant with nothing running finds no place
    while another is ahead of it by a quantum: a flood of requests for one adapter delays no other's.

    A new sequence starts behind what the cache already holds of it. Where another's chunk computes in this step what
    it needs next, it waits for that: candidates of one request compute their prompt once.
    """

    def __init__(
        self, blocks: BlockPool, max_running: int, max_step_tokens: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._blocks = blocks
        self._max_running = min(max_running, max_step_tokens)  # so that all who generate get on in each step
        self._max_step_tokens = max_step_tokens
        self._plan = _Plan(0, 0)
        self._num_running: Counter[str] = Counter()  # by tenant
        self.waiting = FairQueue(max_step_tokens, PATIENCE_SECONDS, now)
        self.running: dict[Sequence, None] = {}  # in the order in which they began

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits for its turn."""
        self.waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended or was cancelled: its place and its blocks are free at once."""
        if sequence in self.running:
            self._remove_running(sequence)
        else:
            self.waiting.remove(sequence)
            self._blocks.free(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks, ordered by adapter slot so that rows of one adapter lie together."""
        self._plan = _Plan(self._max_step_tokens, self._max_step_tokens)
        for sequence in list(self.running):
            generates = sequence.num_tokens - sequence.num_cached_tokens == 1
            if generates and sequence in self.running and self._preempt_until_fits(sequence):
                self._schedule_chunk(sequence)
        self._schedule_prompts()
        return sorted(self._plan.chunks.values(), key=lambda chunk: chunk.sequence.slot)

    def note_computed(self, chunk: ScheduledChunk) -> None:
        """A chunk has been computed: its keys and values are in the cache, and its full blocks can be shared."""
        sequence = chunk.sequence
        sequence.num_cached_tokens += chunk.num_new_tokens
        sequence.encoder_is_cached = True
        self._blocks.cache_full_blocks(sequence)

    def _schedule_prompts(self) -> None:
        """Prompts that have begun and, of each tenant, the sequence that is next: by what their tenants were served."""
        plan = self._plan
        begun = [sequence for sequence in self.running if sequence not in plan.chunks]
        of = {sequence.arrival: sequence for sequence in (*begun, *self.waiting.peek_all())}
        heap = [self._sort_key(sequence) for sequence in of.values()]
        heapq.heapify(heap)
        while heap and plan.budget:
            standing = heapq.heappop(heap)
            sequence = of[standing[1]]
            if standing != self._sort_key(sequence):  # its tenant got something meanwhile
                heapq.heappush(heap, self._sort_key(sequence))
            elif sequence in self.running:
                if sequence not in plan.chunks and self._preempt_until_fits(sequence):
                    self._schedule_chunk(sequence)
            elif not plan.admission_closed and self._admit(sequence):
                following = self.waiting.peek(sequence.fairness_key)
                if following is not None:
                    of[following.arrival] = following
                    heapq.heappush(heap, self._sort_key(following))

    def _sort_key(self, sequence: Sequence) -> tuple[float, int]:
        """The least comes first."""
        return self.waiting.service_received(sequence.fairness_key), sequence.arrival

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, if there is a place; if not, others may pass it until it is overdue."""
        if len(self.running) == self._max_running and not self._may_preempt_for(sequence):
            # Nor may those that come after it and have nothing running: their tenants were served more.
            self._plan.admission_closed = not self._num_running[sequence.fairness_key]
            return False
        self._blocks.match_prefix(sequence)
        num_source_tokens = 0 if sequence.encoder_is_cached else sequence.num_encoder_tokens
        must_wait = self._blocks.next_block_hash(sequence) in self._plan.computing
        if must_wait or num_source_tokens > self._plan.encoder_budget or not self._preempt_for_admission(sequence):
            self._blocks.free(sequence)
            self._plan.admission_closed = not must_wait and self.waiting.is_overdue(sequence)
            return False
        self.waiting.remove(sequence)
        self.running[sequence] = None
        self._num_running[sequence.fairness_key] += 1
        self._plan.encoder_budget -= num_source_tokens
        self._schedule_chunk(sequence)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        has_row = sequence in self.running or len(self.running) < self._max_running
        return has_row and self._blocks.can_extend(sequence, self._chunk_end(sequence))

    def _preempt_for_admission(self, sequence: Sequence) -> bool:
        """Find a place for a new sequence, at others' expense where that is fair."""
        while not self._fits(sequence):
            if not self._may_preempt_for(sequence):
                return False
            self._preempt(self._preemption_victim())
        return True

    def _may_preempt_for(self, sequence: Sequence) -> bool:
        """Whether its tenant has nothing running and is a quantum behind the one that was served most."""
        if self._num_running[sequence.fairness_key] or not self.running:
            return False
        num_served = self.waiting.service_received
        return (
            num_served(self._preemption_victim().fairness_key) - num_served(sequence.fairness_key)
            >= self.waiting.quantum
        )

    def _preempt_until_fits(self, sequence: Sequence) -> bool:
        """Find blocks for a running sequence's next chunk; False when it had to step back itself."""
        while not self._fits(sequence):
            self._plan.admission_closed = True
            last = self._preemption_victim()
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preemption_victim(self) -> Sequence:
        """Who gives way first: of the tenant that was served most, the newest of the least priority."""

        def line(sequence: Sequence) -> tuple[float, int, int]:
            return self.waiting.service_received(sequence.fairness_key), -sequence.priority, sequence.arrival

        return max(self.running, key=line)

    def _preempt(self, sequence: Sequence) -> None:
        chunk = self._plan.chunks.pop(sequence, None)
        if chunk is not None:
            self._plan.budget += chunk.num_new_tokens
            self._plan.encoder_budget += chunk.num_new_encoder_tokens
        self._remove_running(sequence)
        self.waiting.push_back(sequence)

    def _remove_running(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._num_running[sequence.fairness_key] -= 1
        self._blocks.free(sequence)

    def _chunk_end(self, sequence: Sequence) -> int:
        return min(sequence.num_tokens, sequence.num_cached_tokens + self._plan.budget)

    def _schedule_chunk(self, sequence: Sequence) -> None:
        """Into the plan with it: all it can do within the budget."""
        plan, end = self._plan, self._chunk_end(sequence)
        self._blocks.extend(sequence, end)
        chunk = ScheduledChunk(sequence, end - sequence.num_cached_tokens)
        plan.chunks[sequence] = chunk
        plan.budget -= chunk.num_new_tokens
        plan.computing.update(self._blocks.chunk_block_hashes(sequence, chunk.num_new_tokens))
        self._account(chunk)

    def _account(self, chunk: ScheduledChunk) -> None:
        """What a chunk counts against its tenant: nothing for what was computed before and is computed again."""
        sequence = chunk.sequence
        cost = _GENERATED_WEIGHT if chunk.completes else 0
        end = min(sequence.num_cached_tokens + chunk.num_new_tokens, sequence.num_prompt_positions)
        if end > sequence.num_accounted_tokens:
            cost += end - max(sequence.num_cached_tokens, sequence.num_accounted_tokens)
            cost += 0 if sequence.num_accounted_tokens else chunk.num_new_encoder_tokens
            sequence.num_accounted_tokens = end
        self.waiting.add_service(sequence.fairness_key, cost)
