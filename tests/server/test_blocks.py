"""The block pool: every block has one owner, and comes back."""

from hypothesis import given
from hypothesis import strategies as st
from server.sequences import sequence

from quiver_server.blocks import BlockPool


def test_blocks_for_tokens_are_rounded_up() -> None:
    pool, owner = BlockPool(4, 16), sequence(1)
    for num_tokens, num_blocks in ((1, 1), (16, 1), (17, 2), (33, 3)):
        assert pool.can_extend(owner, num_tokens)
        pool.extend(owner, num_tokens)
        assert len(owner.blocks) == num_blocks
        assert pool.num_free_blocks == 4 - num_blocks


def test_no_more_than_there_is() -> None:
    pool, owner = BlockPool(2, 16), sequence(1)
    assert pool.can_extend(owner, 32)
    assert not pool.can_extend(owner, 33)
    pool.extend(owner, 16)
    assert pool.can_extend(owner, 32), "what it has already counts"
    assert not pool.can_extend(sequence(1), 17)


def test_release_gives_all_back_and_forgets_the_cache() -> None:
    pool, owner = BlockPool(3, 4), sequence(12)
    pool.extend(owner, 12)
    owner.num_cached_tokens = 12
    pool.release(owner)
    assert (owner.blocks, owner.num_cached_tokens, pool.num_free_blocks) == ([], 0, 3)
    pool.release(owner)
    assert pool.num_free_blocks == 3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=40))
def test_a_block_never_has_two_owners(moves: list[tuple[int, int]]) -> None:
    """Any order of extending (a length) and releasing (0) of four sequences."""
    pool, owners = BlockPool(10, 4), [sequence(1) for _ in range(4)]
    for which, num_tokens in moves:
        if not num_tokens:
            pool.release(owners[which])
        elif pool.can_extend(owners[which], num_tokens):
            pool.extend(owners[which], num_tokens)
        held = [block for owner in owners for block in owner.blocks]
        assert len(set(held)) == len(held)
        assert len(held) + pool.num_free_blocks == 10
        assert set(held) <= set(range(10))
