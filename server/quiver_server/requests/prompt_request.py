"""The internal request types: what both APIs read, and the validated `PromptRequest` that is admitted and run."""

from dataclasses import dataclass, replace

from quiver_server.engine.sequence import SamplingParams
from quiver_server.errors import InvalidRequestError

_PROMPT_FIELDS = {"prompt", "text", "token_ids"}

# Scoring: the continuation is part of the sequence's prompt, and the one token that ends the sequence is dropped.
SCORING_PARAMS = SamplingParams(num_top_logprobs=1, prompt_logprobs=True)


@dataclass(kw_only=True, slots=True)
class GenerationRequest:
    """A request to generate, as a client sent it. Errors name these fields; each API translates them to its own.

    prompts: texts or token ids. add_special_tokens: to prompts that are texts. max_new_tokens: None is the server's
    default. seed: None is a fresh one. top_logprobs: above 0 it implies logprobs. is_generation: false reports the
    prompts' log-probabilities only.
    """

    adapter_id: str = ""
    prompts: tuple[str | list[int], ...] = ()
    add_special_tokens: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    num_candidates: int = 1
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_string: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    priority: int = 0
    is_generation: bool = True


@dataclass(kw_only=True, slots=True)
class ScoringRequest:
    """A request to score continuations of one prompt, as a client sent it. prompts: the one, or none if missing."""

    adapter_id: str = ""
    prompts: tuple[str | list[int], ...] = ()
    continuations: tuple[str | list[int], ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """One prompt of a valid request.

    is_generation: whether tokens are generated; otherwise the one that ends each sequence is dropped. continuations:
    what to score, one for each candidate; empty when generating.
    """

    adapter_id: str
    prompt: list[int]
    params: SamplingParams
    num_candidates: int
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    priority: int = 0
    continuations: tuple[list[int], ...] = ()
    is_generation: bool = True

    @property
    def fairness_key(self) -> str:
        """The adapter's id without a revision; "" for the base."""
        return fairness_key_of(self.adapter_id)

    @property
    def max_output_tokens(self) -> int:
        """Tokens that must fit into the context after the prompt."""
        return max(map(len, self.continuations), default=1)

    @property
    def describe_output(self) -> str:
        """`max_output_tokens` for error messages."""
        return f"a continuation of {self.max_output_tokens}" if self.continuations else "at least one generated token"

    def as_scoring_request(self) -> "PromptRequest":
        """The same prompt as a scoring request: log-probabilities, no generation."""
        own = self.params
        params = replace(SCORING_PARAMS, num_top_logprobs=own.num_top_logprobs, prompt_logprobs=own.prompt_logprobs)
        return replace(self, params=params, stop_strings=(), is_generation=False)


def fairness_key_of(adapter_id: str) -> str:
    """The adapter's id without a revision: all revisions of an adapter share its part of the server."""
    return adapter_id.partition("@")[0]


def add_prompt_index(error: InvalidRequestError, index: int, num_prompts: int) -> None:
    """Add the prompt's index to the field of an error of a multi-prompt request."""
    if num_prompts > 1 and error.field in _PROMPT_FIELDS:
        error.field += f"[{index}]"
