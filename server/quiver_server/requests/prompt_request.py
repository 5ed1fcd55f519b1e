"""What a valid request asks for, prompt by prompt, and how a prompt among several is named."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from quiver_server.engine.sequence import GREEDY, SamplingParams
from quiver_server.errors import InvalidRequestError

_PROMPT_FIELDS = {"prompt", "text", "tokens.ids"}

# How Score runs: the continuation is part of the prompt, and the one token that ends the sequence is thrown away.
SCORING_PARAMS = replace(GREEDY, num_top_logprobs=1, prompt_logprobs=True)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt of a valid request.

    draws: whether tokens are generated; otherwise the one that ends each sequence is thrown away. continuations: what
    Score is to score, one for each candidate; empty when generating.
    """

    adapter_id: str
    prompt: list[int]
    params: SamplingParams
    num_candidates: int
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    priority: int = 0
    continuations: tuple[list[int], ...] = ()
    is_generation: bool = True

    @property
    def fairness_key(self) -> str:
        """The adapter's id without a revision; "": the base."""
        return fairness_key_of(self.adapter_id)

    @property
    def max_output_tokens(self) -> int:
        """Tokens that must fit into the context after the prompt."""
        return max(map(len, self.continuations), default=1)

    @property
    def describe_output(self) -> str:
        """The same in words."""
        return f"a continuation of {self.max_output_tokens}" if self.continuations else "at least one generated token"

    def as_scoring_request(self) -> "PromptRequest":
        """The same prompt, of which is told how likely it is; nothing is generated."""
        asked = self.params
        params = replace(SCORING_PARAMS, num_top_logprobs=asked.num_top_logprobs, prompt_logprobs=asked.prompt_logprobs)
        return replace(self, params=params, stop_strings=(), is_generation=False)


def fairness_key_of(adapter_id: str) -> str:
    """Whose places a request takes: all revisions of an adapter share theirs."""
    return adapter_id.partition("@")[0]


@contextmanager
def prompt_error_context(number: int, num_prompts: int) -> Generator[None]:
    """What is wrong with a prompt is said of this one, where there are several."""
    try:
        yield
    except InvalidRequestError as error:
        if num_prompts > 1 and error.field in _PROMPT_FIELDS:
            error.field += f"[{number}]"
        raise
