"""Whose turn it is among those who wait. A clock of its own, no model."""

from support.sequences import sequence

from quiver_server.engine.fair_queue import FairQueue
from quiver_server.engine.sequence import Sequence


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def asking(slot: int, priority: int = 0) -> Sequence:
    item = sequence(4, slot)
    item.priority = priority
    return item


def make(quantum: int = 100) -> tuple[FairQueue, Clock]:
    clock = Clock()
    return FairQueue(quantum, 3.0, clock), clock


def names(queue: FairQueue) -> dict[str, float]:
    return {item.fairness_key: queue.service_received(item.fairness_key) for item in queue.peek_all()}


def test_first_come_first_served_within_a_tenant() -> None:
    queue, _ = make()
    items = [asking(1) for _ in range(3)]
    for item in items:
        queue.push(item)
    assert list(queue) == items
    assert queue.peek("adapter-1") is items[0]
    assert queue.remove(items[0])
    assert not queue.remove(items[0])
    assert queue.peek("adapter-1") is items[1]
    queue.push_back(items[0])
    assert queue.peek("adapter-1") is items[0], "who ran before stands before those that came later"
    assert len(queue) == 3


def test_a_tenant_without_anybody_waiting_has_no_head() -> None:
    queue, _ = make()
    item = asking(1)
    queue.push(item)
    queue.remove(item)
    assert (queue.peek_all(), queue.peek("adapter-1"), bool(queue), len(queue)) == ([], None, False, 0)
    assert not queue.remove(asking(2))


def test_priority_is_within_a_tenant_and_bounded_by_patience() -> None:
    queue, clock = make()
    low, high, other = asking(1, -1), asking(1, 5), asking(2)
    for item in (low, high, other):
        queue.push(item)
    assert set(queue.peek_all()) == {high, other}
    clock.now = 2.9
    assert queue.peek("adapter-1") is high
    clock.now = 3.1
    later = asking(1, 9)
    queue.push(later)
    assert queue.peek("adapter-1") is low, "overdue, and here before the other overdue one"
    queue.remove(low)
    assert queue.peek("adapter-1") is high
    queue.remove(high)
    assert queue.peek("adapter-1") is later
    assert not queue.is_overdue(later)


def test_who_comes_back_keeps_a_quantum_of_credit_at_most() -> None:
    queue, _ = make(quantum=100)
    queue.push(asking(1))
    queue.add_service("adapter-1", 5000)
    queue.push(asking(2))
    assert names(queue) == {"adapter-1": 5000, "adapter-2": 4900}


def test_who_comes_back_keeps_a_quantum_of_debt_at_most() -> None:
    queue, _ = make(quantum=100)
    first, second = asking(1), asking(2)
    queue.push(first)
    queue.remove(first)
    queue.add_service("adapter-1", 5000)  # while nobody else wanted anything
    queue.push(second)
    queue.push(first)
    assert names(queue) == {"adapter-1": 100, "adapter-2": 0}


def test_being_idle_saves_nothing_up_while_others_are_served() -> None:
    """The floor does not fall when the tenants that raised it have gone."""
    queue, _ = make(quantum=100)
    one, two = asking(1), asking(2)
    queue.push(one)
    queue.add_service("adapter-1", 700)
    queue.remove(one)
    queue.push(two)
    assert names(queue) == {"adapter-2": 600}
