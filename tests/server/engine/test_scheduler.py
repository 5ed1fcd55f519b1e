"""Who runs in the next step: chunks, budgets, order, stepping back. No model here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sequences import sequence

from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.scheduler import ScheduledChunk, Scheduler
from quiver_server.engine.sequence import Sequence

OTHER_PROMPT = list(range(50, 58))


def make(
    num_blocks: int = 64, block_size: int = 4, max_running: int = 8, max_step_tokens: int = 16, share: bool = True
) -> tuple[Scheduler, BlockPool]:
    blocks = BlockPool(num_blocks, block_size, share=share)
    return Scheduler(blocks, max_running, max_step_tokens), blocks


def run_step(scheduler: Scheduler) -> list[ScheduledChunk]:
    """What the engine does with a plan, without a model: note what is cached, append a token where complete."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        completes = chunk.completes
        scheduler.note_computed(chunk)
        if completes:
            chunk.sequence.generated.append(1)
            if len(chunk.sequence.generated) == chunk.sequence.params.max_new_tokens:
                scheduler.remove(chunk.sequence)
    return chunks


def sizes(chunks: list[ScheduledChunk]) -> list[int]:
    return [chunk.num_new_tokens for chunk in chunks]


def test_nothing_to_do() -> None:
    assert make()[0].schedule() == []


def test_a_long_prompt_is_cut_into_chunks() -> None:
    scheduler, _ = make()
    scheduler.add(sequence(40))
    steps = [run_step(scheduler) for _ in range(5)]
    assert [sizes(chunks) for chunks in steps] == [[16], [16], [8], [1], [1]]


def test_running_sequences_come_before_new_ones() -> None:
    """A long prompt that arrives later takes what the budget leaves, and holds nobody up."""
    scheduler, _ = make()
    early, late = sequence(5), sequence(100)
    scheduler.add(early)
    run_step(scheduler)
    scheduler.add(late)
    for _ in range(3):
        assert {id(c.sequence): c.num_new_tokens for c in run_step(scheduler)} == {id(early): 1, id(late): 15}


def test_the_budget_bounds_a_step() -> None:
    scheduler, _ = make(max_step_tokens=10)
    for _ in range(4):
        scheduler.add(sequence(4))
    assert sizes(run_step(scheduler)) == [4, 4, 2]


def test_rows_are_bounded_and_served_in_order_of_arrival() -> None:
    scheduler, _ = make(max_running=2)
    sequences = [sequence(2, max_new_tokens=1) for _ in range(5)]
    for item in sequences:
        scheduler.add(item)
    order = [[sequences.index(chunk.sequence) for chunk in run_step(scheduler)] for _ in range(3)]
    assert order == [[0, 1], [2, 3], [4]]


def test_chunks_are_ordered_by_slot() -> None:
    scheduler, _ = make()
    for slot in (3, 0, 2, 3, 0):
        scheduler.add(sequence(2, slot))
    assert [chunk.sequence.slot for chunk in run_step(scheduler)] == [0, 0, 2, 3, 3]


def test_the_newest_steps_back_when_blocks_run_out() -> None:
    scheduler, blocks = make(num_blocks=4, block_size=4)
    old, new = sequence(8), sequence(OTHER_PROMPT)
    scheduler.add(old)
    scheduler.add(new)
    assert sizes(run_step(scheduler)) == [8, 8]
    chunks = run_step(scheduler)
    assert [chunk.sequence for chunk in chunks] == [old]
    assert list(scheduler.waiting) == [new]
    assert (new.blocks, new.num_cached_tokens, new.generated) == ([], 0, [1])
    assert blocks.num_free_blocks == 1


@pytest.mark.parametrize(("share", "expected"), [(False, 9), (True, 5)])
def test_one_that_stepped_back_computes_again_what_the_cache_lost(share: bool, expected: int) -> None:
    """All of its 9 tokens without sharing; with it, the one block that `old` did not take is found again."""
    scheduler, _ = make(num_blocks=4, block_size=4, share=share)
    old, new = sequence(8, max_new_tokens=3), sequence(OTHER_PROMPT, max_new_tokens=3)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(3):
        run_step(scheduler)
    assert not scheduler.running
    chunks = run_step(scheduler)
    assert [(chunk.sequence, chunk.num_new_tokens) for chunk in chunks] == [(new, expected)]


def test_removal_frees_place_and_blocks() -> None:
    scheduler, blocks = make(max_running=1)
    running, waiting = sequence(8), sequence(8)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    assert not scheduler.running
    assert not scheduler.waiting
    assert blocks.num_free_blocks == blocks.num_blocks


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(11, 20),
    st.integers(1, 40),
    st.integers(1, 6),
)
def test_everybody_is_served_in_the_end(
    wanted: list[tuple[int, int, int]], num_blocks: int, max_step_tokens: int, max_running: int
) -> None:
    """Any load whose single sequences fit into the cache ends, keeps its limits and leaks no block."""
    scheduler, blocks = make(num_blocks, 4, max_running, max_step_tokens)
    sequences: list[Sequence] = []
    for prompt, max_new_tokens, slot in wanted:
        sequences.append(sequence(prompt, slot, max_new_tokens=max_new_tokens))
        scheduler.add(sequences[-1])
    for _ in range(5000):
        if not (scheduler.running or scheduler.waiting):
            break
        chunks = run_step(scheduler)
        assert chunks, "no progress"
        assert sum(sizes(chunks)) <= max_step_tokens
        assert len(chunks) <= max_running
        slots = [chunk.sequence.slot for chunk in chunks]
        assert slots == sorted(slots)
    assert [len(item.generated) for item in sequences] == [item.params.max_new_tokens for item in sequences]
    assert blocks.num_free_blocks == num_blocks


def test_equal_prompts_are_computed_once() -> None:
    """Those that come with the first wait one step for it; each still computes its last token."""
    scheduler, blocks = make(max_running=8, max_step_tokens=64)
    sequences = [sequence(17, max_new_tokens=3) for _ in range(4)]
    for item in sequences:
        scheduler.add(item)
    assert sizes(run_step(scheduler)) == [17]
    assert sizes(run_step(scheduler)) == [1, 1, 1, 1]
    assert [item.num_reused_tokens for item in sequences] == [0, 16, 16, 16]
    assert blocks.num_free_blocks == 64 - 4 - 4, "four blocks shared, one more for each"


def test_a_cut_prompt_is_followed_at_its_own_pace() -> None:
    """The second takes what the first has computed, and waits for what it is computing; another prompt does not."""
    scheduler, _ = make(max_step_tokens=16)
    first, second = sequence(40), sequence(40)
    scheduler.add(first)
    scheduler.add(second)
    assert sizes(run_step(scheduler)) == [16]
    scheduler.add(other := sequence([99, 98], 1))
    assert {c.sequence: c.num_new_tokens for c in run_step(scheduler)} == {first: 14, other: 2}
    assert {c.sequence: c.num_new_tokens for c in run_step(scheduler)} == {first: 10, other: 1}
    assert {c.sequence: c.num_new_tokens for c in run_step(scheduler)} == {first: 1, second: 4, other: 1}


def test_nobody_waits_for_another_adapter() -> None:
    scheduler, _ = make(max_step_tokens=64)
    for slot in (0, 1, 2):
        scheduler.add(sequence(20, slot))
    assert sizes(run_step(scheduler)) == [20, 20, 20]


def test_sequences_with_shared_blocks_step_back() -> None:
    """The newest goes; what it shared stays with the others, and it comes back with that."""
    scheduler, blocks = make(num_blocks=5, block_size=4)
    old, new = sequence(9, max_new_tokens=8), sequence(9, max_new_tokens=8)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(6):
        run_step(scheduler)
        assert old.blocks[:2] == new.blocks[:2] or not new.blocks
    assert new in scheduler.waiting
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
    assert (len(old.generated), len(new.generated)) == (8, 8)
    assert blocks.num_free_blocks == 5
