"""What the client answers with: plain frozen dataclasses, free of gRPC and protobuf.

Fields mean what the messages of the same name in `quiver/v1/*.proto` say.
"""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a candidate ended."""

    UNSPECIFIED = "unspecified"  # a newer server's reason that this client does not know
    EOS = "eos"  # the model drew an end-of-sequence token
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"  # max_new_tokens reached, or the model's context full


class AdapterState(StrEnum):
    """Where an adapter is."""

    UNSPECIFIED = "unspecified"  # a newer server's state that this client does not know
    REGISTERED = "registered"  # known, not in memory; its first request loads it
    LOADING = "loading"
    RESIDENT = "resident"  # in memory; requests run at once
    FAILED = "failed"  # see Adapter.failure_reason
    HOST = "host"  # read and validated, in main memory; its first request waits for a copy


class UnloadPolicy(StrEnum):
    """What happens to the requests of an adapter that is unloaded."""

    WAIT = "wait"  # they finish first
    REFUSE = "refuse"  # while there are any, nothing is unloaded
    CANCEL = "cancel"  # they end with `CallCancelled`


class Tier(StrEnum):
    """How near to the device an adapter is brought."""

    DEVICE = "device"  # requests run at once
    HOST = "host"  # requests wait for a copy from main memory


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter answered: its id, the SHA-256 of its content, and its methods."""

    id: str
    revision: str
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at a position, and its natural log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability, and the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted over a whole request; `prompt_tokens` is without `virtual_tokens`."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    virtual_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request arrived at the server."""

    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to the prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A complete answer. `text`, `token_ids` and `finish_reason` are those of the first candidate."""

    candidates: tuple[Candidate, ...]
    usage: Usage
    adapter: AdapterRef | None  # None: the base model answered alone
    request_id: str
    timing: Timing

    @property
    def text(self) -> str:
        """The generated text, without the prompt."""
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens, including an end-of-sequence or stop token that was drawn."""
        return self.candidates[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the generation ended."""
        return self.candidates[0].finish_reason


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one candidate of a stream."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None  # in the last piece of a candidate
    adapter: AdapterRef | None  # in the first piece of the stream, unless the base model answers alone
    request_id: str  # in the first piece of the stream, else ""
    prompt_logprobs: tuple[TokenLogprob, ...]  # in the first piece of the stream, when asked for
    usage: Usage | None  # in the last piece of the stream
    timing: Timing | None  # in the last piece of the stream


@dataclass(frozen=True, slots=True)
class Score:
    """How likely one continuation is: its tokens, the sum of their log-probabilities, whether greedy gives it."""

    logprobs: tuple[TokenLogprob, ...]
    total_logprob: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """A score for each continuation that was asked for, in their order."""

    scores: tuple[Score, ...]
    usage: Usage
    adapter: AdapterRef | None  # None: the base model alone
    request_id: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's tokens; `pieces` is empty unless asked for."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Alias:
    """A second name, for one exact revision."""

    name: str
    adapter_id: str
    revision: str


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision of an adapter that the server holds somewhere."""

    revision: str
    state: AdapterState
    running: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as the server knows it now."""

    id: str
    revision: str
    methods: tuple[str, ...]
    source: str
    state: AdapterState
    device_bytes: int
    host_bytes: int
    pinned: bool
    running: int  # requests in the running batch
    waiting: int  # requests waiting for it to load, or for a place in the batch
    failure_reason: str
    base_fingerprint: str
    rank: int
    virtual_tokens: int
    parameters: int
    description: str
    disk_bytes: int  # that its revisions take on the server's disk
    aliases: tuple[Alias, ...]
    revisions: tuple[Revision, ...]  # the current one first


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """What has changed since the one before; a stream's first has every adapter and replaces all that was known."""

    is_snapshot: bool
    adapters: tuple[Adapter, ...]
    removed_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """The base model and the server's limits."""

    name: str
    architecture: str
    vocab_size: int
    context_length: int  # tokens
    dtype: str
    device: str
    fingerprint: str
    parameters: int
    kv_capacity_tokens: int
    adapter_methods: tuple[str, ...]
    server_version: str
    default_max_new_tokens: int
