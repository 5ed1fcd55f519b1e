"""The block pool: a block has one owner, or several that begin alike; it comes back, and may be found again."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sequences import sequence

from quiver_server.engine.block_hashes import hash_block
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.sequence import Sequence

SOURCE = list(range(30))


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
    pool.free(owner)
    assert (owner.blocks, owner.num_cached_tokens, pool.num_free_blocks) == ([], 0, 3)
    pool.free(owner)
    assert pool.num_free_blocks == 3


def compute(pool: BlockPool, owner: Sequence) -> None:
    """What scheduler and engine do for all of a sequence's tokens."""
    pool.match_prefix(owner)
    assert pool.can_extend(owner, owner.num_tokens)
    pool.extend(owner, owner.num_tokens)
    owner.num_cached_tokens, owner.encoder_is_cached = owner.num_tokens, True
    pool.cache_full_blocks(owner)


def reused(pool: BlockPool, owner: Sequence) -> int:
    """How many tokens a sequence would find; it keeps nothing."""
    pool.match_prefix(owner)
    found = owner.num_cached_tokens
    pool.free(owner)
    return found


def test_full_blocks_are_found_by_who_begins_alike() -> None:
    pool = BlockPool(16, 4)
    first = sequence(11)
    compute(pool, first)
    tokens = first.prompt
    assert reused(pool, sequence([*tokens, 7, 7])) == 8, "the last block is not full"
    assert reused(pool, sequence([*tokens[:8], 7])) == 8
    assert reused(pool, sequence(tokens[:8])) == 4, "the last token is always left to compute"
    assert reused(pool, sequence([*tokens[:5], 7, 7, 7, 7])) == 4
    assert reused(pool, sequence([7, *tokens])) == 0
    assert reused(pool, sequence(tokens[4:])) == 0, "the same tokens at another place"
    pool.free(first)
    assert reused(pool, sequence([*tokens, 7])) == 8, "found without an owner too"
    assert pool.num_free_blocks == 16


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    pool = BlockPool(16, 4)
    first = sequence(3)
    first.generated += [1, 2, 3, 4, 5, 6]
    compute(pool, first)
    pool.free(first)
    assert reused(pool, sequence([*first.prompt, 1, 2, 3, 4, 5, 9, 9])) == 8


def test_an_adapters_blocks_are_its_revisions_alone() -> None:
    pool = BlockPool(64, 4)
    for slot in (0, 1):
        compute(pool, sequence(20, slot))
    assert reused(pool, sequence(20, 1)) == 16
    assert reused(pool, sequence(20, 2)) == 0
    same_slot = sequence(20, 1)
    same_slot.revision = "another revision in the same slot"
    assert reused(pool, same_slot) == 0
    other_slot = sequence(20, 5)
    other_slot.revision = sequence(20, 1).revision
    assert reused(pool, other_slot) == 16, "loaded again: the same content, wherever it lies"


def test_virtual_tokens_are_shared_and_not_counted_as_prompt() -> None:
    pool = BlockPool(64, 4)
    first, second, other = (sequence(prompt, 1) for prompt in ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [1, 2]))
    for item in (first, second, other):
        item.num_virtual_tokens = 10
    compute(pool, first)
    assert reused(pool, second) == 12
    assert second.num_reused_tokens == 2
    assert reused(pool, other) == 8
    assert other.num_reused_tokens == 0


def test_prompt_logprobs_need_every_row_once() -> None:
    pool = BlockPool(64, 4)
    compute(pool, sequence(20))
    asking = sequence(20, prompt_logprobs=True)
    assert reused(pool, asking) == 0
    asking.generated.append(3)
    assert reused(pool, asking) == 20, "they are known by then"


def test_a_source_is_shared_as_a_whole() -> None:
    pool = BlockPool(64, 4)

    def asking(source: list[int], slot: int = 0) -> Sequence:
        item = sequence([0], slot)
        item.encoder_input = source
        return item

    first = asking(SOURCE)
    compute(pool, first)
    same, shorter, other = asking(SOURCE), asking(SOURCE[:28]), asking(SOURCE, slot=3)
    for item in (same, shorter, other):
        pool.match_prefix(item)
    assert (same.encoder_is_cached, same.encoder_blocks, same.num_reused_tokens) == (True, first.encoder_blocks, 30)
    assert (shorter.encoder_is_cached, shorter.encoder_blocks) == (False, [])
    assert (other.encoder_is_cached, other.encoder_blocks) == (False, [])


def test_what_an_answer_says_depends_on_its_source() -> None:
    pool = BlockPool(64, 4)
    items = [sequence([0]) for _ in range(3)]
    for item, source in zip(items, (SOURCE, SOURCE, SOURCE[1:]), strict=True):
        item.encoder_input = source
        item.generated = list(range(40, 49))
    compute(pool, items[0])
    assert (reused(pool, items[1]), reused(pool, items[2])) == (8, 0)


def test_names_tell_contents_apart() -> None:
    """No two of a few thousand contents that differ in one token, place, revision or length share a name."""
    names: dict[bytes, tuple[str, list[int]]] = {}
    for revision in ("", "a", "b"):
        for length in range(4, 60, 4):
            for changed in range(length):
                item = sequence(length)
                item.revision = revision
                item.prompt[changed] += 1000
                name = hash_block(item, length // 4 - 1, 4)
                content = (revision, item.prompt)
                assert names.setdefault(name, content) == content
    assert len(names) == 3 * sum(range(4, 60, 4))


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(8, 4)
    early, late = sequence(16), sequence(16, 1)
    for item in (early, late):
        compute(pool, item)
        pool.free(item)
    taker = sequence(9, 2)
    compute(pool, taker)
    assert (reused(pool, sequence(16)), reused(pool, sequence(17, 1))) == (4, 16)


def test_nothing_is_shared_when_told_so() -> None:
    pool = BlockPool(16, 4, share=False)
    compute(pool, sequence(12))
    assert reused(pool, sequence(13)) == 0
    assert pool.next_block_hash(sequence(13)) is None


PROMPTS = [[1] * 14, [1] * 9 + [2] * 5, [1] * 4 + [3] * 12, [4] * 3, [5] * 16]


@pytest.mark.parametrize("share", [True, False])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 16)), max_size=60))
def test_a_block_is_shared_by_equal_beginnings_alone(share: bool, moves: list[tuple[int, int]]) -> None:
    """Any order of computing to a length and releasing (0): nothing leaks, and nobody reads what is not his."""
    pool, owners = BlockPool(10, 4, share=share), [sequence(prompt) for prompt in PROMPTS]
    content: dict[int, tuple[int, ...]] = {}  # of each block, as whoever computed it left it
    for which, num_tokens in moves:
        owner = owners[which]
        if not num_tokens:
            pool.free(owner)
        else:
            if not owner.blocks:
                pool.match_prefix(owner)
                for index, block in enumerate(owner.blocks):
                    assert content[block] == tuple(owner.prompt[: (index + 1) * 4])
            end = max(min(num_tokens, len(owner.prompt)), owner.num_cached_tokens)
            if not pool.can_extend(owner, end):
                continue
            pool.extend(owner, end)
            for index in range(owner.num_cached_tokens // 4, len(owner.blocks)):
                content[owner.blocks[index]] = tuple(owner.prompt[: min(end, (index + 1) * 4)])
            owner.num_cached_tokens = end
            pool.cache_full_blocks(owner)
        held = Counter(block for owner in owners for block in owner.blocks)
        assert len(held) + pool.num_free_blocks == 10
        for block, num_owners in held.items():
            sharing = [(owner.blocks.index(block), owner) for owner in owners if block in owner.blocks]
            beginnings = {tuple(owner.prompt[: (index + 1) * 4]) for index, owner in sharing}
            assert num_owners == len(sharing)
            assert num_owners == 1 or len(beginnings) == 1
        for owner in owners:
            for index in range(owner.num_cached_tokens // 4):
                assert content[owner.blocks[index]] == tuple(owner.prompt[: (index + 1) * 4])
    for owner in owners:
        pool.free(owner)
    assert pool.num_free_blocks == 10
