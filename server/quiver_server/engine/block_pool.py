"""The blocks of the key-value cache: who has which, and which can be shared. No torch here."""

from collections import OrderedDict

from quiver_server.engine.block_hashes import hash_block, hash_encoder_input
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
        self._num_references = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, without an owner

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence has; some of them hold what a later one may share."""
        return len(self._free) + len(self._idle)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there are blocks enough for the sequence's source and its first `num_tokens` tokens."""
        wanted = self._num_blocks(num_tokens) + self._num_blocks(sequence.num_encoder_tokens)
        return wanted - len(sequence.blocks) - len(sequence.encoder_blocks) <= self.num_free_blocks

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence the blocks it lacks for its source and its first `num_tokens` tokens."""
        for table, wanted in ((sequence.encoder_blocks, sequence.num_encoder_tokens), (sequence.blocks, num_tokens)):
            for _ in range(self._num_blocks(wanted) - len(table)):
                table.append(self._take_block())

    def match_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that already hold its source and its first tokens.

        Tokens whose logits are wanted are left to compute: always the last one.
        """
        if not self._share:
            return
        self._match_encoder_input(sequence)
        for index in range(sequence.first_logits_position // self.block_size):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            sequence.blocks.append(self._add_reference(block))
        sequence.num_hashed_blocks = len(sequence.blocks)
        sequence.num_cached_tokens = len(sequence.blocks) * self.block_size
        if not sequence.started:
            num_prompt_tokens = max(sequence.num_cached_tokens - sequence.num_virtual_tokens, 0)
            in_source = len(sequence.encoder_input) if sequence.encoder_is_cached else 0
            sequence.num_reused_tokens = in_source if sequence.encoder_input else num_prompt_tokens

    def _match_encoder_input(self, sequence: Sequence) -> None:
        """A source is read as a whole, so it is shared as a whole or not at all."""
        num_blocks = self._num_blocks(sequence.num_encoder_tokens)
        found = [self._block_of.get(hash_encoder_input(sequence, index)) for index in range(num_blocks)]
        known = [block for block in found if block is not None]
        if found and len(known) == num_blocks:
            sequence.encoder_blocks += [self._add_reference(block) for block in known]
            sequence.encoder_is_cached = True

    def next_block_hash(self, sequence: Sequence) -> bytes | None:
        """The name of the first block that a sequence which reused what there is lacks, if that could be shared."""
        if not self._share:
            return None
        if sequence.encoder_input and not sequence.encoder_is_cached:
            return hash_encoder_input(sequence, 0)
        index = len(sequence.blocks)
        return None if sequence.first_logits_position // self.block_size <= index else self._hash(sequence, index)

    def chunk_block_hashes(self, sequence: Sequence, num_new_tokens: int) -> list[bytes]:
        """The names of the blocks that the sequence's next tokens will fill, its source's first."""
        if not self._share:
            return []
        keys = [hash_encoder_input(sequence, 0)] if sequence.encoder_input and not sequence.encoder_is_cached else []
        first = sequence.num_cached_tokens
        indices = range(first // self.block_size, (first + num_new_tokens) // self.block_size)
        return keys + [self._hash(sequence, index) for index in indices]

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """What the sequence has computed can be shared from now on."""
        if not self._share:
            return
        if sequence.encoder_input and not sequence.encoder_is_hashed:
            sequence.encoder_is_hashed = True
            for index, block in enumerate(sequence.encoder_blocks):
                self._publish(block, hash_encoder_input(sequence, index))
        num_full = sequence.num_cached_tokens // self.block_size
        for index in range(sequence.num_hashed_blocks, num_full):
            self._publish(sequence.blocks[index], self._hash(sequence, index))
        sequence.num_hashed_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back. What is named may be found again, its end being forgotten first."""
        for table in (sequence.blocks, sequence.encoder_blocks):
            for block in reversed(table):
                self._num_references[block] -= 1
                if self._num_references[block]:
                    continue
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
            table.clear()
        sequence.num_cached_tokens = sequence.num_hashed_blocks = 0
        sequence.encoder_is_cached = sequence.encoder_is_hashed = False

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        return hash_block(sequence, index, self.block_size)

    def _publish(self, block: int, key: bytes) -> None:
        """Unless the same was computed twice at once: then the first is the one that is found."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def _add_reference(self, block: int) -> int:
        self._idle.pop(block, None)
        self._num_references[block] += 1
        return block

    def _take_block(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._num_references[block] = 1
        return block
