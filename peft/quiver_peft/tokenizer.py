"""The tokenizer of a base folder: text to ids and back, and its digest."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from quiver_peft.errors import CheckpointError


class Tokenizer:
    """`tokenizer.json` of a Hugging Face folder. digest: SHA-256 of that file. longest_token: its characters."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            data = path.read_bytes()
            self._fast = FastTokenizer.from_str(data.decode())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a base folder holds its tokenizer") from None
        except Exception as error:  # the library raises bare Exception for malformed files
            raise CheckpointError(f"{path}: not readable as a tokenizer: {error}") from None
        # A training-time setting that must never cut or pad a request.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.longest_token = max(map(len, self._fast.get_vocab()), default=1)
        self.digest = hashlib.sha256(data).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the special tokens that this tokenizer's post-processor adds (e.g. a leading BOS)."""
        # A batch of one: the library releases the GIL for batches only.
        return self._fast.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, such as "<extra_id_0>"."""
        return self._fast.token_to_id(token)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id by itself, for display."""
        return [self._fast.decode([i], skip_special_tokens=False) for i in ids]
