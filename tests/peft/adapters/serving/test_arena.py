"""The adapter memory: whatever is allocated and freed in whatever order, extents stay apart and gaps melt together."""

from itertools import pairwise
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quiver_peft.adapters.serving.arena import ALIGNMENT_ELEMENTS, Arena, Extent

CAPACITY = 64 * ALIGNMENT_ELEMENTS
CPU = torch.device("cpu")
# A positive number allocates that many elements, a negative one frees one of those that are held.
OPERATIONS = st.lists(st.one_of(st.integers(1, CAPACITY // 3), st.integers(-20, -1)), max_size=60)


def arena(num_elements: int = CAPACITY) -> Arena:
    return Arena(num_elements * 4, torch.float32, CPU)


def round_up(size: int) -> int:
    return (size + ALIGNMENT_ELEMENTS - 1) // ALIGNMENT_ELEMENTS * ALIGNMENT_ELEMENTS


def gaps(held: list[Extent], capacity: int) -> list[int]:
    """Sizes of what lies between extents: the slow, obvious way."""
    edges = sorted(held, key=lambda extent: extent.start)
    starts = [extent.start for extent in edges] + [capacity]
    ends = [0] + [extent.start + extent.size for extent in edges]
    return [start - end for start, end in zip(starts, ends, strict=True) if start > end]


@given(OPERATIONS)
def test_extents_stay_disjoint_aligned_and_coalesced(operations: list[int]) -> None:
    memory, held = arena(), list[Extent]()
    for operation in operations:
        free = gaps(held, CAPACITY)
        if operation < 0:
            if held:
                memory.free(held.pop(operation % len(held)))
        else:
            extent = memory.allocate(operation)
            # It fails exactly when no single gap is large enough: nothing is lost to unmelted neighbours.
            assert (extent is None) == (max(free, default=0) < round_up(operation))
            if extent is not None:
                held.append(extent)
                assert extent.size == round_up(operation)
                assert extent.start % ALIGNMENT_ELEMENTS == 0
                assert extent.start + extent.size <= CAPACITY
        ordered = sorted(held, key=lambda extent: extent.start)
        assert all(a.start + a.size <= b.start for a, b in pairwise(ordered))
        assert memory.free_bytes == sum(gaps(held, CAPACITY)) * 4


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_freeing_everything_in_any_order_gives_back_one_gap(sizes: list[int], order: Random) -> None:
    memory = arena()
    held = [extent for size in sizes if (extent := memory.allocate(size)) is not None]
    order.shuffle(held)
    for extent in held:
        memory.free(extent)
    assert memory.free_bytes == CAPACITY * 4
    assert memory.allocate(CAPACITY) == Extent(0, CAPACITY)


@settings(max_examples=20)
@given(st.integers(0, 5 * ALIGNMENT_ELEMENTS))
def test_a_capacity_that_is_no_multiple_of_the_alignment(capacity: int) -> None:
    memory = arena(capacity)
    whole = capacity // ALIGNMENT_ELEMENTS
    held = [memory.allocate(1) for _ in range(whole)]
    assert None not in held
    assert memory.allocate(1) is None
    assert memory.free_bytes == (capacity - whole * ALIGNMENT_ELEMENTS) * 4


def test_views_share_the_buffer_and_nothing_else() -> None:
    memory = arena()
    first, second = memory.allocate(20), memory.allocate(40)
    assert first is not None
    assert second is not None
    memory.buffer.zero_()
    memory.view(first).fill_(1)
    memory.view(second).fill_(2)
    assert memory.view(first).sum() == first.size
    assert memory.view(second).sum() == 2 * second.size
    assert memory.buffer.sum() == first.size + 2 * second.size
    assert memory.view(first).data_ptr() == memory.buffer.data_ptr()


def test_the_buffer_never_moves() -> None:
    memory = arena()
    address = memory.buffer.data_ptr()
    for size in (5, 500, 100):
        extent = memory.allocate(size)
        assert extent is not None
        memory.free(extent)
    assert memory.buffer.data_ptr() == address


def test_the_capacity_is_in_bytes_of_the_type() -> None:
    assert Arena(1024, torch.bfloat16, CPU).buffer.numel() == 512
    assert Arena(1024, torch.float32, CPU).free_bytes == 1024
    assert Arena(1024, torch.bfloat16, CPU).free_bytes == 1024
