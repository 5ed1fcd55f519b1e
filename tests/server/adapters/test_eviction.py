"""Who gives way: the cheapest stretch of the adapter memory that is long enough."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from quiver_server.adapters.eviction import GdsfPolicy, ResidentRange, choose_victims


def layout(*pieces: tuple[int, float | None]) -> tuple[list[ResidentRange], int]:
    """Pieces of so many bytes one after another, each of a worth; -1: a gap. And the length of it all."""
    items, start = list[ResidentRange](), 0
    for slot, (size, worth) in enumerate(pieces):
        if worth != -1:
            items.append(ResidentRange(slot, start, start + size, worth))
        start += size
    return items, start


def test_nobody_gives_way_where_there_is_room() -> None:
    items, capacity = layout((4, 1.0), (3, -1), (4, 2.0))
    assert choose_victims(items, capacity, 3) == []
    assert choose_victims([], 10, 10) == []


def test_the_least_worth_gives_way() -> None:
    items, capacity = layout((4, 3.0), (4, 1.0), (4, 2.0))
    assert choose_victims(items, capacity, 4) == [1]
    assert choose_victims(items, capacity, 8) == [1, 2]


def test_a_gap_beside_makes_a_dearer_one_the_cheaper_choice() -> None:
    """Fragmented: 6 bytes are free in all, none of the gaps takes 5; one that lies between two of them goes."""
    items, capacity = layout((3, -1), (2, 5.0), (3, -1), (9, None), (4, 1.0), (9, None))
    assert choose_victims(items, capacity, 5) == [1]
    assert choose_victims(items, capacity, 4) == [4]


def test_what_is_in_use_stays_and_parts_the_memory() -> None:
    items, capacity = layout((4, 1.0), (4, None), (4, 1.0))
    assert choose_victims(items, capacity, 5) is None
    assert choose_victims(items, capacity, 4) == [0]
    assert choose_victims(items, capacity, 13) is None


pieces = st.tuples(st.integers(1, 6), st.one_of(st.none(), st.just(-1.0), st.integers(1, 9).map(float)))


@given(st.lists(pieces, min_size=1, max_size=7), st.integers(1, 20))
def test_no_other_choice_is_cheaper(wanted: list[tuple[int, float | None]], needed: int) -> None:
    items, capacity = layout(*wanted)

    def largest_gap(cleared: tuple[ResidentRange, ...]) -> int:
        edges = [(0, 0), *((item.start, item.end) for item in items if item not in cleared), (capacity, capacity)]
        return max(start - end for (_, end), (start, _) in pairwise(edges))

    movable = [item for item in items if item.priority is not None]
    worths = {
        sum(item.priority or 0.0 for item in cleared)
        for length in range(len(movable) + 1)
        for cleared in combinations(movable, length)
        if largest_gap(cleared) >= needed
    }
    found = choose_victims(items, capacity, needed)
    if found is None:
        assert not worths
        return
    chosen = tuple(item for item in items if item.slot in found)
    assert largest_gap(chosen) >= needed
    assert sum(item.priority or 0.0 for item in chosen) == min(worths)


def test_worth_is_uses_times_cost_by_the_byte_and_ages() -> None:
    ageing = GdsfPolicy()
    assert ageing.priority(1, 0.5, 100) < ageing.priority(2, 0.5, 100)
    assert ageing.priority(1, 0.5, 100) < ageing.priority(1, 1.0, 100)
    assert ageing.priority(1, 0.5, 100) > ageing.priority(1, 0.5, 200)
    popular_once = ageing.priority(50, 0.5, 100)
    for _ in range(60):  # newcomers that nobody asks for again
        ageing.on_evicted(ageing.priority(1, 0.5, 100))
    assert ageing.priority(1, 0.5, 100) > popular_once
    ageing.on_evicted(0.0)
    assert ageing.priority(1, 0.5, 100) > popular_once, "it never grows younger"
