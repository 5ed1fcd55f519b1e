"""From Python arguments to request messages and call metadata, for the sync and the async client alike."""

from collections.abc import Iterable, Sequence
from typing import TypedDict, Unpack

import grpc

from quiver.errors import InvalidRequest
from quiver.results import Tier, UnloadPolicy
from quiver.v1 import adapters_pb2, generation_pb2

ADAPTER_METADATA_KEY = "x-adapter-id"
# What the endpoint picker of a Gateway API inference gateway reads for a call that it cannot parse.
GATEWAY_METADATA_KEY = "x-gateway-model-name-rewrite"


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; an option left out or None takes the server's default."""

    adapter: str  # an id, "id@revision" or an alias; "": the base model alone
    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None  # 0: greedy (the default)
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    n: int | None  # number of candidates
    stop: str | Sequence[str] | None  # end when the text contains (one of) these
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    include_stop_string: bool
    logprobs: bool
    top_logprobs: int | None  # alternatives per token; implies logprobs
    prompt_logprobs: bool
    request_id: str
    priority: int | None  # among the waiting requests of the same adapter, -10 to 10: higher ones run first


def generate_request(prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> generation_pb2.GenerateRequest:
    """The message for `prompt` (text or token ids).

    Raises `TypeError` for an unknown option or a value of the wrong type, and `InvalidRequest` for a value
    that its field cannot hold, such as a negative count. Every other rule is the server's.
    """
    unknown = sorted(set(options) - GenerateOptions.__annotations__.keys())
    if unknown:
        known = ", ".join(GenerateOptions.__annotations__)
        raise TypeError(f"unknown option {unknown[0]!r}; the options are: {known}")
    _check_counts(prompt, options)
    try:
        request = generation_pb2.GenerateRequest(
            adapter_id=options.get("adapter", ""),
            sampling=_sampling(options),
            stopping=_stopping(options),
            output=_output(options),
            request_id=options.get("request_id", ""),
            priority=options.get("priority") or 0,
        )
        _set_prompt(request, prompt)
    except UnicodeEncodeError as error:
        raise _invalid(f"a text of the request is not valid Unicode: {error}") from error
    return request


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of `score`."""

    adapter: str  # as in GenerateOptions
    top_logprobs: int  # alternatives per token
    request_id: str


def score_request(
    prompt: str | Sequence[int], continuations: Sequence[str | Sequence[int]], **options: Unpack[ScoreOptions]
) -> generation_pb2.ScoreRequest:
    """The message that asks how likely `continuations` of `prompt` are. Raises as `generate_request` does."""
    unknown = sorted(set(options) - ScoreOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are: {', '.join(ScoreOptions.__annotations__)}")
    if isinstance(continuations, str):
        raise TypeError("continuations must be a list of texts or of token ids, not one text")
    _check_unsigned("top_logprobs", options.get("top_logprobs", 0), num_bits=32)
    for tokens in (prompt, *continuations):
        if not isinstance(tokens, str):
            _check_unsigned("a token id", tokens, num_bits=32)
    try:
        request = generation_pb2.ScoreRequest(
            adapter_id=options.get("adapter", ""),
            top_logprobs=options.get("top_logprobs", 0),
            request_id=options.get("request_id", ""),
            continuations=[
                generation_pb2.Continuation(text=item)
                if isinstance(item, str)
                else generation_pb2.Continuation(tokens=generation_pb2.TokenIds(ids=item))
                for item in continuations
            ],
        )
        _set_prompt(request, prompt)
    except UnicodeEncodeError as error:
        raise _invalid(f"a text of the request is not valid Unicode: {error}") from error
    return request


def _set_prompt(
    request: generation_pb2.GenerateRequest | generation_pb2.ScoreRequest, prompt: str | Sequence[int]
) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.CopyFrom(generation_pb2.TokenIds(ids=prompt))


def _check_counts(prompt: str | Sequence[int], options: GenerateOptions) -> None:
    """Refuses what a field of whole numbers cannot hold: protobuf's own error would not name the option."""
    counts: dict[str, int | Sequence[int] | None] = {
        "prompt": None if isinstance(prompt, str) else prompt,
        "max_new_tokens": options.get("max_new_tokens"),
        "min_new_tokens": options.get("min_new_tokens"),
        "top_k": options.get("top_k"),
        "n": options.get("n"),
        "stop_token_ids": options.get("stop_token_ids"),
        "top_logprobs": options.get("top_logprobs"),
    }
    for name, value in counts.items():
        if value is not None:
            _check_unsigned(name, value, num_bits=32)
    _check_unsigned("seed", options.get("seed") or 0, num_bits=64)
    priority = options.get("priority") or 0
    if not -(2**31) <= priority < 2**31:
        raise _invalid(f"priority is {priority}: it must lie between -2^31 and 2^31 - 1")


def _check_unsigned(name: str, value: int | Sequence[int], num_bits: int) -> None:
    for number in value if isinstance(value, Iterable) else (value,):
        if not 0 <= number < 2**num_bits:
            raise _invalid(f"{name} is {number}: it must lie between 0 and 2^{num_bits} - 1")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, grpc.StatusCode.INVALID_ARGUMENT)


def _output(options: GenerateOptions) -> generation_pb2.Output:
    return generation_pb2.Output(
        logprobs=options.get("logprobs", False),
        top_logprobs=options.get("top_logprobs") or 0,
        prompt_logprobs=options.get("prompt_logprobs", False),
    )


def _sampling(options: GenerateOptions) -> generation_pb2.Sampling:
    return generation_pb2.Sampling(
        temperature=options.get("temperature") or 0.0,
        top_k=options.get("top_k") or 0,
        top_p=options.get("top_p"),
        min_p=options.get("min_p") or 0.0,
        repetition_penalty=options.get("repetition_penalty"),
        presence_penalty=options.get("presence_penalty") or 0.0,
        frequency_penalty=options.get("frequency_penalty") or 0.0,
        seed=options.get("seed"),
        n=options.get("n"),
    )


def _stopping(options: GenerateOptions) -> generation_pb2.Stopping:
    stop = options.get("stop") or ()
    return generation_pb2.Stopping(
        max_new_tokens=options.get("max_new_tokens"),
        min_new_tokens=options.get("min_new_tokens") or 0,
        strings=[stop] if isinstance(stop, str) else stop,
        token_ids=options.get("stop_token_ids") or (),
        ignore_eos=options.get("ignore_eos", False),
        include_stop_string=options.get("include_stop_string", False),
    )


_TIERS = {
    Tier.DEVICE: adapters_pb2.LoadAdapterRequest.TIER_DEVICE,
    Tier.HOST: adapters_pb2.LoadAdapterRequest.TIER_HOST,
}
_UNLOAD_POLICIES = {
    UnloadPolicy.WAIT: adapters_pb2.UnloadAdapterRequest.RUNNING_WAIT,
    UnloadPolicy.REFUSE: adapters_pb2.UnloadAdapterRequest.RUNNING_REFUSE,
    UnloadPolicy.CANCEL: adapters_pb2.UnloadAdapterRequest.RUNNING_CANCEL,
}


def load_request(adapter_id: str, source: str, pin: bool | None, tier: Tier) -> adapters_pb2.LoadAdapterRequest:
    """The message that brings an adapter in."""
    return adapters_pb2.LoadAdapterRequest(adapter_id=adapter_id, source=source, pin=pin, tier=_TIERS[tier])


def unload_request(adapter_id: str, running: UnloadPolicy) -> adapters_pb2.UnloadAdapterRequest:
    """The message that takes an adapter out."""
    return adapters_pb2.UnloadAdapterRequest(adapter_id=adapter_id, running=_UNLOAD_POLICIES[running])


def routing_metadata(adapter_id: str) -> tuple[tuple[str, str], ...]:
    """The metadata by which a proxy, or gRPC itself, sends requests for one adapter to the same replica.

    All revisions of an adapter go where its id goes. Empty for the base, and for an id that metadata cannot carry: any
    replica can refuse that one.
    """
    name = adapter_id.partition("@")[0]
    if not name or not name.isascii() or not name.isprintable():
        return ()
    return (ADAPTER_METADATA_KEY, name), (GATEWAY_METADATA_KEY, name)
