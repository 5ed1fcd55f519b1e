"""From response messages to the dataclasses of `results`, for the sync and the async client alike."""

from collections.abc import Iterable

from quiver.results import (
    Adapter,
    AdapterChanges,
    AdapterRef,
    AdapterState,
    Alias,
    Alternative,
    Candidate,
    FinishReason,
    Generation,
    Model,
    Piece,
    Revision,
    Score,
    Scoring,
    Timing,
    TokenLogprob,
    Tokens,
    Usage,
)
from quiver.v1 import adapters_pb2, generation_pb2, model_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    generation_pb2.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    generation_pb2.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}

_ADAPTER_STATES = {
    adapters_pb2.Adapter.STATE_REGISTERED: AdapterState.REGISTERED,
    adapters_pb2.Adapter.STATE_LOADING: AdapterState.LOADING,
    adapters_pb2.Adapter.STATE_RESIDENT: AdapterState.RESIDENT,
    adapters_pb2.Adapter.STATE_FAILED: AdapterState.FAILED,
    adapters_pb2.Adapter.STATE_HOST: AdapterState.HOST,
}


def generation(message: generation_pb2.GenerateResponse) -> Generation:
    """A complete answer."""
    return Generation(
        candidates=tuple(_candidate(candidate) for candidate in message.candidates),
        usage=_usage(message.usage),
        adapter=_adapter_ref(message.adapter) if message.HasField("adapter") else None,
        request_id=message.request_id,
        timing=_timing(message.timing),
    )


def piece(message: generation_pb2.GenerateStreamResponse) -> Piece:
    """One message of a stream."""
    ended = message.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    return Piece(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_token_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason) if ended else None,
        adapter=_adapter_ref(message.adapter) if message.HasField("adapter") else None,
        request_id=message.request_id,
        prompt_logprobs=_token_logprobs(message.prompt_logprobs),
        usage=_usage(message.usage) if message.HasField("usage") else None,
        timing=_timing(message.timing) if message.HasField("timing") else None,
    )


def scoring(message: generation_pb2.ScoreResponse) -> Scoring:
    """The scores of continuations."""
    return Scoring(
        scores=tuple(
            Score(
                logprobs=_token_logprobs(score.logprobs),
                total_logprob=score.total_logprob,
                is_greedy=score.is_greedy,
            )
            for score in message.scores
        ),
        usage=_usage(message.usage),
        adapter=_adapter_ref(message.adapter) if message.HasField("adapter") else None,
        request_id=message.request_id,
        timing=_timing(message.timing),
    )


def tokens(message: generation_pb2.TokenizeResponse) -> Tokens:
    """A tokenized text."""
    return Tokens(token_ids=tuple(message.token_ids), pieces=tuple(message.pieces))


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    """An adapter's description."""
    return Adapter(
        id=message.id,
        revision=message.revision,
        methods=tuple(message.methods),
        source=message.source,
        state=_ADAPTER_STATES.get(message.state, AdapterState.UNSPECIFIED),
        device_bytes=message.device_bytes,
        host_bytes=message.host_bytes,
        pinned=message.pinned,
        running=message.running,
        waiting=message.waiting,
        failure_reason=message.failure_reason,
        base_fingerprint=message.base_fingerprint,
        rank=message.rank,
        virtual_tokens=message.virtual_tokens,
        parameters=message.parameters,
        description=message.description,
        disk_bytes=message.disk_bytes,
        aliases=tuple(alias(item) for item in message.aliases),
        revisions=tuple(_revision(item) for item in message.revisions),
    )


def alias(message: adapters_pb2.Alias) -> Alias:
    """An alias and what it names."""
    return Alias(name=message.name, adapter_id=message.adapter_id, revision=message.revision)


def adapter_changes(message: adapters_pb2.WatchAdaptersResponse) -> AdapterChanges:
    """One message of a watch."""
    return AdapterChanges(
        is_snapshot=message.snapshot,
        adapters=tuple(adapter(item) for item in message.adapters),
        removed_ids=tuple(message.removed_ids),
    )


def model(message: model_pb2.GetModelResponse) -> Model:
    """The base model's description."""
    return Model(
        name=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        dtype=message.dtype,
        device=message.device,
        fingerprint=message.fingerprint,
        parameters=message.parameters,
        kv_capacity_tokens=message.kv_capacity_tokens,
        adapter_methods=tuple(message.adapter_methods),
        server_version=message.server_version,
        default_max_new_tokens=message.default_max_new_tokens,
    )


def _revision(message: adapters_pb2.Revision) -> Revision:
    return Revision(
        revision=message.revision,
        state=_ADAPTER_STATES.get(message.state, AdapterState.UNSPECIFIED),
        running=message.running,
        device_bytes=message.device_bytes,
        host_bytes=message.host_bytes,
        disk_bytes=message.disk_bytes,
        pinned=message.pinned,
    )


def _candidate(message: generation_pb2.Candidate) -> Candidate:
    return Candidate(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason),
        logprobs=_token_logprobs(message.logprobs),
        prompt_logprobs=_token_logprobs(message.prompt_logprobs),
    )


def _finish_reason(value: generation_pb2.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def _token_logprobs(messages: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            logprob=message.logprob,
            top=tuple(Alternative(token_id=top.token_id, logprob=top.logprob) for top in message.top),
        )
        for message in messages
    )


def _adapter_ref(message: generation_pb2.AdapterRef) -> AdapterRef:
    return AdapterRef(id=message.id, revision=message.revision, methods=tuple(message.methods))


def _usage(message: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        generated_tokens=message.generated_tokens,
        cached_tokens=message.cached_tokens,
        virtual_tokens=message.virtual_tokens,
    )


def _timing(message: generation_pb2.Timing) -> Timing:
    return Timing(
        queue_seconds=message.queue_seconds,
        time_to_first_token_seconds=message.time_to_first_token_seconds,
        total_seconds=message.total_seconds,
    )
