"""The blocks of the key-value cache: who has which. No torch here."""

from quiver_server.request import Sequence


class BlockPool:
    """Hands out fixed-size blocks of the cache to sequences. Ask with `can_extend`, then do with `extend`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there are blocks enough for the sequence's source and its first `num_tokens` tokens."""
        wanted = self._num_blocks(num_tokens) + self._num_blocks(sequence.num_source_tokens)
        return wanted - len(sequence.blocks) - len(sequence.source_blocks) <= len(self._free)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence the blocks it lacks for its source and its first `num_tokens` tokens."""
        for table, wanted in ((sequence.source_blocks, sequence.num_source_tokens), (sequence.blocks, num_tokens)):
            for _ in range(self._num_blocks(wanted) - len(table)):
                table.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back; what it had cached is gone."""
        for table in (sequence.blocks, sequence.source_blocks):
            self._free += reversed(table)
            table.clear()
        sequence.num_cached_tokens = 0
        sequence.source_is_cached = False
