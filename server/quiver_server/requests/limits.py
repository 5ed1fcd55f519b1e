"""Limits of a request: the server's bounds on lengths and counts, and the checks that need them."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from quiver_server.errors import InvalidRequestError, require

MAX_CANDIDATES = 16
MAX_CONTINUATIONS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
MAX_TOP_LOGPROBS = 20
MAX_PRIORITY = 10


@dataclass(frozen=True)
class Limits:
    """The bounds of one server. Lengths are in tokens.

    max_prompt, max_new: the server's options, at most context_length. max_source_length: the encoder's input, which
    it reads in one step; None with a decoder-only base. longest_token: in characters.
    """

    vocab_size: int
    longest_token: int
    context_length: int
    max_prompt: int
    max_new: int
    max_source_length: int | None
    default_max_new_tokens: int
    eos_ids: frozenset[int]

    def check_text(self, text: str, field: str) -> None:
        """Raises InvalidRequestError for a text that is too long for any prompt, before it is tokenized."""
        most = self.max_prompt * self.longest_token
        rule = f"at most {most} characters, the most that {self.max_prompt} tokens have (this server's longest prompt)"
        require(len(text) <= most, field, f"a text of {len(text)} characters", rule)

    def check_tokens(self, tokens: Seq[int], field: str) -> None:
        """Raises InvalidRequestError for a token id outside of the vocabulary."""
        largest = max(tokens, default=0)
        require(largest < self.vocab_size, field, largest, f"below the vocabulary size {self.vocab_size}")

    def check_prompt_length(self, num_tokens: int, field: str) -> None:
        """Raises InvalidRequestError."""
        if num_tokens >= self.context_length:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; with at least one generated token it must fit into the context "
                f"of {self.context_length}",
                field,
            )
        if num_tokens > self.max_prompt:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; this server takes {self.max_prompt} at most "
                "(--max-prompt-tokens)",
                field,
            )
        self.check_source_length(num_tokens, 0, field)

    def check_source_length(self, num_tokens: int, num_virtual_tokens: int, field: str) -> None:
        """Raises InvalidRequestError for a prompt that the encoder cannot read in one step."""
        limit = self.max_source_length
        if limit is not None and num_virtual_tokens + num_tokens > limit:
            virtual = f" beside {num_virtual_tokens} virtual tokens of the adapter" if num_virtual_tokens else ""
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens{virtual}; the encoder reads {limit} at most, all in one step "
                "(--max-step-tokens)",
                field,
            )

    def check_new_tokens(self, wanted: int) -> None:
        """Raises InvalidRequestError for an answer longer than the server allows."""
        field = "max_new_tokens"
        require(wanted >= 1, field, wanted, "at least 1")
        # A bound of the whole context refuses nothing: longer answers are cut where the context ends.
        if self.max_new < self.context_length:
            require(wanted <= self.max_new, field, wanted, f"at most {self.max_new} (--max-new-tokens)")
