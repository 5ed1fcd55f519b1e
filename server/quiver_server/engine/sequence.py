"""The nouns of the engine: what a request asks for, the sequences it becomes, and what a step says about them."""

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
    """How the next token is chosen; the wire's `Sampling`, `Stopping` and `Output`, validated, defaults filled in.

    seed: always set (a fresh one when the client gave none). stop_ids: ends at these; eos_ids is the subset that is
    the model's own. num_top_logprobs: None when no log-probabilities are wanted.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    num_top_logprobs: int | None
    prompt_logprobs: bool

    @property
    def greedy(self) -> bool:
        """Take the most likely token."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


# One token, the most likely; nothing restricts it, and nothing is told of it. Others are made from it by `replace`.
GREEDY = SamplingParams(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=0,
    max_new_tokens=1,
    min_new_tokens=0,
    stop_ids=frozenset(),
    eos_ids=frozenset(),
    num_top_logprobs=None,
    prompt_logprobs=False,
)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What one step did for one sequence. Made by the engine, read by whoever answers the client.

    token_id is None when the sequence is gone without an end of its own: with an `error`, or because it was cancelled.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        """Whether the engine has let go of the sequence."""
        return self.token_id is None or self.finish_reason is not None


@dataclass(eq=False)
class Sequence:
    """One candidate on its way through the engine.

    Set by the service: prompt, params, index (which candidate), slot and revision of its adapter (0 and "" for the
    base), num_virtual_tokens (that this adapter puts before the prompt), emit (called once for each event, in the
    service's thread), tenant (whose share of the engine it takes: the adapter's id), priority (within the tenant),
    first_logprob (the first token of the prompt whose log-probability is told, when they are asked for). With an
    encoder-decoder the client's prompt is the source, which is read before the first step, and `prompt` is what the
    answer starts with inside. The rest belongs to the engine's thread.
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

    arrival: int = -1  # its number in the queue
    waiting_since_seconds: float = 0.0  # of the monotonic clock
    num_accounted_tokens: int = 0  # its first positions, up to its prompt's end, that count against its tenant already
    generated: list[int] = field(default_factory=list[int])
    num_cached_tokens: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list[int])
    encoder_blocks: list[int] = field(default_factory=list[int])
    encoder_is_cached: bool = False
    num_reused_tokens: int = 0  # tokens of the client's prompt that were in the cache when the sequence first ran
    block_hashes: list[bytes] = field(default_factory=list[bytes])  # names of its first blocks, as far as made
    num_hashed_blocks: int = 0
    encoder_digest: bytes = b""
    encoder_is_hashed: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    started: bool = False

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
        """Positions of the source, virtual tokens included; 0 without one."""
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
