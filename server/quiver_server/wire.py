"""Between the wire's messages and the engine's dataclasses: every rule a request must keep is checked here."""

import math
import secrets
from dataclasses import dataclass

from quiver.v1 import generation_pb2
from quiver_peft.tokenizer import Tokenizer
from quiver_server.errors import InvalidRequestError
from quiver_server.request import FinishReason, SamplingParams, TokenLogprob

MAX_CANDIDATES = 16
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_PRIORITY = 10

FINISH_REASONS = {
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class Limits:
    """What requests are measured against. Lengths in tokens.

    max_source_length: of what an encoder reads, which it does in one step; None with a decoder-only base.
    """

    vocab_size: int
    context_length: int
    max_source_length: int | None
    default_max_new_tokens: int
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Asked:
    """A valid request."""

    adapter_id: str
    prompt: list[int]
    params: SamplingParams
    num_candidates: int
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    request_id: str
    priority: int


def read_request(message: generation_pb2.GenerateRequest, tokenizer: Tokenizer, limits: Limits) -> Asked:
    """Check a request and fill in its defaults. Raises InvalidRequestError, which names the field."""
    prompt = _read_prompt(message, tokenizer, limits)
    params = _read_params(message, limits, room=limits.context_length - len(prompt))
    num_candidates = message.sampling.n if message.sampling.HasField("n") else 1
    _require(1 <= num_candidates <= MAX_CANDIDATES, "sampling.n", num_candidates, f"from 1 to {MAX_CANDIDATES}")
    if num_candidates > 1 and params.greedy:
        raise InvalidRequestError(
            f"sampling.n is {num_candidates} with temperature 0: all candidates would be the same", "sampling.n"
        )
    in_range = -MAX_PRIORITY <= message.priority <= MAX_PRIORITY
    _require(in_range, "priority", message.priority, f"from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    strings = tuple(message.stopping.strings)
    _require(len(strings) <= MAX_STOP_STRINGS, "stopping.strings", len(strings), f"at most {MAX_STOP_STRINGS} strings")
    _require(all(strings), "stopping.strings", "an empty string", "without empty strings")
    return Asked(
        message.adapter_id,
        prompt,
        params,
        num_candidates,
        strings,
        message.stopping.include_stop_string,
        message.request_id or secrets.token_hex(8),
        message.priority,
    )


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{field} is {value}; it must be {rule}", field)


def _read_prompt(message: generation_pb2.GenerateRequest, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("the prompt is missing: set text or tokens", "prompt")
    field = "text" if kind == "text" else "tokens.ids"
    prompt = tokenizer.encode(message.text) if kind == "text" else list(message.tokens.ids)
    if not (message.text if kind == "text" else prompt) or not prompt:
        raise InvalidRequestError("the prompt is empty; it must have at least one token", field)
    for token in prompt:
        _require(token < limits.vocab_size, field, token, f"below the vocabulary size {limits.vocab_size}")
    if len(prompt) >= limits.context_length:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; with at least one generated token it must fit into the context of "
            f"{limits.context_length}",
            field,
        )
    check_source_length(len(prompt), 0, limits, field)
    if message.output.prompt_logprobs and limits.max_source_length is not None:
        raise InvalidRequestError(
            "output.prompt_logprobs is set; an encoder-decoder reads its prompt and predicts none of it",
            "output.prompt_logprobs",
        )
    return prompt


def check_source_length(num_tokens: int, num_virtual_tokens: int, limits: Limits, field: str) -> None:
    """Raises InvalidRequestError for a source that an encoder could not read in one step."""
    limit = limits.max_source_length
    if limit is not None and num_virtual_tokens + num_tokens > limit:
        virtual = f" beside {num_virtual_tokens} virtual tokens of the adapter" if num_virtual_tokens else ""
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens{virtual}; the encoder reads {limit} at most, all in one step "
            "(--max-step-tokens)",
            field,
        )


def _read_params(message: generation_pb2.GenerateRequest, limits: Limits, room: int) -> SamplingParams:
    sampling, stopping, output = message.sampling, message.stopping, message.output
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    wanted = stopping.max_new_tokens if stopping.HasField("max_new_tokens") else limits.default_max_new_tokens
    finite = math.isfinite
    _require(
        finite(sampling.temperature) and sampling.temperature >= 0,
        "sampling.temperature",
        sampling.temperature,
        "0 or more",
    )
    _require(0 < top_p <= 1, "sampling.top_p", top_p, "above 0 and at most 1")
    _require(0 <= sampling.min_p <= 1, "sampling.min_p", sampling.min_p, "from 0 to 1")
    _require(finite(repetition) and repetition > 0, "sampling.repetition_penalty", repetition, "above 0")
    for name, value in (("presence", sampling.presence_penalty), ("frequency", sampling.frequency_penalty)):
        _require(-2 <= value <= 2, f"sampling.{name}_penalty", value, "from -2 to 2")
    _require(wanted >= 1, "stopping.max_new_tokens", wanted, "at least 1")
    _require(
        stopping.min_new_tokens <= wanted,
        "stopping.min_new_tokens",
        stopping.min_new_tokens,
        f"at most {wanted}, max_new_tokens",
    )
    for token in stopping.token_ids:
        _require(
            token < limits.vocab_size, "stopping.token_ids", token, f"below the vocabulary size {limits.vocab_size}"
        )
    _require(
        output.top_logprobs <= MAX_TOP_LOGPROBS,
        "output.top_logprobs",
        output.top_logprobs,
        f"at most {MAX_TOP_LOGPROBS}",
    )
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=top_p,
        min_p=sampling.min_p,
        repetition_penalty=repetition,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        max_new_tokens=min(wanted, room),
        min_new_tokens=stopping.min_new_tokens,
        stop_ids=frozenset(stopping.token_ids),
        eos_ids=frozenset() if stopping.ignore_eos else limits.eos_ids,
        num_top_logprobs=output.top_logprobs if output.logprobs or output.top_logprobs else None,
        prompt_logprobs=output.prompt_logprobs,
    )


def logprob_message(item: TokenLogprob) -> generation_pb2.TokenLogprob:
    """A log-probability as the wire says it."""
    top = [generation_pb2.Alternative(token_id=token, logprob=value) for token, value in item.top]
    return generation_pb2.TokenLogprob(token_id=item.token_id, logprob=item.logprob, top=top)
