"""The names of cache blocks: equal names hold equal keys and values, whoever computed them.

A name is a digest of everything that the content depends on: the adapter's revision (never its id, which may come to
mean other weights), all tokens up to the block's end, and with an encoder-decoder the source. Virtual tokens follow
from the revision. The base is not in it: a process has one. 256 bits, so that a name stands for its tokens.
"""

from array import array
from hashlib import blake2b

from quiver_server.engine.sequence import Sequence

_DIGEST_BYTES = 32


def hash_block(sequence: Sequence, index: int, block_size: int) -> bytes:
    """The name of the sequence's block `index`, all of whose tokens must be known."""
    keys = sequence.block_hashes
    while len(keys) <= index:
        first = len(keys) * block_size
        parent = keys[-1] if keys else _seed(sequence)
        keys.append(_digest(parent, sequence.tokens(first, first + block_size)))
    return keys[index]


def hash_encoder_input(sequence: Sequence, index: int) -> bytes:
    """The name of block `index` of an encoder-decoder's source, which is read as a whole: every token sees all."""
    if not sequence.encoder_digest:
        sequence.encoder_digest = _digest(b"source " + sequence.revision.encode(), sequence.encoder_input)
    return sequence.encoder_digest + index.to_bytes(4, "little")


def _seed(sequence: Sequence) -> bytes:
    return hash_encoder_input(sequence, 0) if sequence.encoder_input else b"tokens " + sequence.revision.encode()


def _digest(before: bytes, tokens: list[int]) -> bytes:
    content = len(before).to_bytes(4, "little") + before + array("I", tokens).tobytes()
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()
