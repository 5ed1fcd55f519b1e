"""The blocks of the key-value cache: who has which, and which can be shared. No torch here."""

from collections import OrderedDict

from quiver_server.engine.block_hashes import block_key, source_key
from quiver_server.engine.sequence import Sequence


class BlockPool:
    """Hands out fixed-size blocks of the cache to sequences. Ask with `can_extend`, then do with `extend`.

    A full block has a name (block_keys.py) and any number of owners, who only read it. Without an owner it stays until
    its place is needed, the least recently used first. share: whether blocks are named at all.
    """

    def __init__(self, num_blocks: int, block_size: int, *, share: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._share = share
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, without an owner

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence has; some of them hold what a later one may share."""
        return len(self._free) + len(self._idle)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there are blocks enough for the sequence's source and its first `num_tokens` tokens."""
        wanted = self._num_blocks(num_tokens) + self._num_blocks(sequence.num_source_tokens)
        return wanted - len(sequence.blocks) - len(sequence.source_blocks) <= self.num_free_blocks

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence the blocks it lacks for its source and its first `num_tokens` tokens."""
        for table, wanted in ((sequence.source_blocks, sequence.num_source_tokens), (sequence.blocks, num_tokens)):
            for _ in range(self._num_blocks(wanted) - len(table)):
                table.append(self._take_block())

    def reuse(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that already hold its source and its first tokens.

        Tokens whose logits are wanted are left to compute: always the last one.
        """
        if not self._share:
            return
        self._reuse_source(sequence)
        for index in range(sequence.num_unasked_tokens // self.block_size):
            block = self._block_of.get(self._key(sequence, index))
            if block is None:
                break
            sequence.blocks.append(self._own(block))
        sequence.num_named_blocks = len(sequence.blocks)
        sequence.num_cached_tokens = len(sequence.blocks) * self.block_size
        if not sequence.started:
            num_prompt_tokens = max(sequence.num_cached_tokens - sequence.num_virtual_tokens, 0)
            in_source = len(sequence.source) if sequence.source_is_cached else 0
            sequence.num_reused_tokens = in_source if sequence.source else num_prompt_tokens

    def _reuse_source(self, sequence: Sequence) -> None:
        """A source is read as a whole, so it is shared as a whole or not at all."""
        num_blocks = self._num_blocks(sequence.num_source_tokens)
        found = [self._block_of.get(source_key(sequence, index)) for index in range(num_blocks)]
        known = [block for block in found if block is not None]
        if found and len(known) == num_blocks:
            sequence.source_blocks += [self._own(block) for block in known]
            sequence.source_is_cached = True

    def next_key(self, sequence: Sequence) -> bytes | None:
        """The name of the first block that a sequence which reused what there is lacks, if that could be shared."""
        if not self._share:
            return None
        if sequence.source and not sequence.source_is_cached:
            return source_key(sequence, 0)
        index = len(sequence.blocks)
        return None if sequence.num_unasked_tokens // self.block_size <= index else self._key(sequence, index)

    def keys_of_chunk(self, sequence: Sequence, num_new_tokens: int) -> list[bytes]:
        """The names of the blocks that the sequence's next tokens will fill, its source's first."""
        if not self._share:
            return []
        keys = [source_key(sequence, 0)] if sequence.source and not sequence.source_is_cached else []
        first = sequence.num_cached_tokens
        indices = range(first // self.block_size, (first + num_new_tokens) // self.block_size)
        return keys + [self._key(sequence, index) for index in indices]

    def name_full_blocks(self, sequence: Sequence) -> None:
        """What the sequence has computed can be shared from now on."""
        if not self._share:
            return
        if sequence.source and not sequence.source_is_named:
            sequence.source_is_named = True
            for index, block in enumerate(sequence.source_blocks):
                self._name(block, source_key(sequence, index))
        num_full = sequence.num_cached_tokens // self.block_size
        for index in range(sequence.num_named_blocks, num_full):
            self._name(sequence.blocks[index], self._key(sequence, index))
        sequence.num_named_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back. What is named may be found again, its end being forgotten first."""
        for table in (sequence.blocks, sequence.source_blocks):
            for block in reversed(table):
                self._num_owners[block] -= 1
                if self._num_owners[block]:
                    continue
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
            table.clear()
        sequence.num_cached_tokens = sequence.num_named_blocks = 0
        sequence.source_is_cached = sequence.source_is_named = False

    def _key(self, sequence: Sequence, index: int) -> bytes:
        return block_key(sequence, index, self.block_size)

    def _name(self, block: int, key: bytes) -> None:
        """Unless the same was computed twice at once: then the first is the one that is found."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def _own(self, block: int) -> int:
        self._idle.pop(block, None)
        self._num_owners[block] += 1
        return block

    def _take_block(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._num_owners[block] = 1
        return block
