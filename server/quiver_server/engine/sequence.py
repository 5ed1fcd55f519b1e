"""Engine data types: sampling parameters, sequences, token events."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from quiver_peft.adapters.serving.banks import BASE_SLOT
from quiver_server.errors import RequestError


class FinishReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """Validated sampling, stopping and log-probability parameters. The defaults generate one greedy token.

    seed: validation draws one when the client gives none. stop_ids: the client's stop tokens; eos_ids: the model's own
    end-of-sequence tokens, empty when the client ignores them. num_top_logprobs: None without log-probabilities.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_new_tokens: int = 1
    min_new_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    num_top_logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """The result of one step for one sequence.

    token_id is None when the sequence failed (`error` is set) or was cancelled.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        """Whether the engine has released the sequence."""
        return self.token_id is None or self.finish_reason is not None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One candidate in the engine.

    The constructor's arguments are the input and never change; all other fields belong to the engine's thread.

    prompt: with an encoder-decoder this is the decoder's start token, and `encoder_input` is the client's prompt.
    index: of the candidate, which its random draws depend on. emit: called in the event loop with each event. slot,
    revision: of the adapter; BASE_SLOT and "" are the base. num_virtual_tokens: the adapter's rows before `prompt`.
    on_first_scheduled: called in the engine's thread. fairness_key: the adapter's id, whose share of the engine the
    sequence uses. priority: among sequences with this key. first_logprob: the first token of `prompt` whose
    log-probability is reported with `prompt_logprobs`.
    """

    prompt: list[int]
    params: SamplingParams
    index: int
    emit: Callable[[TokenEvent], None]
    slot: int = BASE_SLOT
    num_virtual_tokens: int = 0
    on_first_scheduled: Callable[[], None] = lambda: None
    encoder_input: list[int] = field(default_factory=list[int])
    num_virtual_encoder_tokens: int = 0
    revision: str = ""
    fairness_key: str = ""
    priority: int = 0
    first_logprob: int = 1

    arrival: int = field(default=-1, init=False)  # its number in the queue
    waiting_since_seconds: float = field(default=0.0, init=False)  # of the monotonic clock
    num_accounted_tokens: int = field(default=0, init=False)  # prompt positions already charged to its fairness key
    generated: list[int] = field(default_factory=list[int], init=False)
    num_cached_tokens: int = field(default=0, init=False)  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list[int], init=False)
    encoder_blocks: list[int] = field(default_factory=list[int], init=False)
    encoder_is_cached: bool = field(default=False, init=False)
    num_reused_tokens: int = field(default=0, init=False)  # of the client's prompt, found in the cache at first run
    block_hashes: list[bytes] = field(default_factory=list[bytes], init=False)  # of its first blocks, as far as known
    num_hashed_blocks: int = field(default=0, init=False)
    encoder_digest: bytes = field(default=b"", init=False)
    encoder_is_hashed: bool = field(default=False, init=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob], init=False)
    started: bool = field(default=False, init=False)

    @property
    def num_tokens(self) -> int:
        """Positions taken so far: virtual tokens, prompt, generated."""
        return self.num_virtual_tokens + len(self.prompt) + len(self.generated)

    @property
    def first_logits_position(self) -> int:
        """Positions before the first whose logits are wanted."""
        if self.params.prompt_logprobs and not self.generated:
            return self.num_virtual_tokens + self.first_logprob - 1
        return self.num_tokens - 1

    @property
    def num_encoder_tokens(self) -> int:
        """Encoder positions, virtual tokens included; 0 with a decoder-only base."""
        return self.num_virtual_encoder_tokens + len(self.encoder_input)

    @property
    def num_prompt_positions(self) -> int:
        """Positions before the first generated token."""
        return self.num_virtual_tokens + len(self.prompt)

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions [start, end); a virtual token has the placeholder 0."""
        virtual = [0] * (min(end, self.num_virtual_tokens) - min(start, self.num_virtual_tokens))
        start, end = max(start - self.num_virtual_tokens, 0), max(end - self.num_virtual_tokens, 0)
        split = len(self.prompt)
        return virtual + self.prompt[start:end] + self.generated[max(start - split, 0) : max(end - split, 0)]
