"""gRPC requests: reads the protobuf messages of GenerationService into the internal request types."""

from quiver.v1 import generation_pb2
from quiver_server.requests.prompt_request import GenerationRequest, ScoringRequest

# Where the internal fields are in the messages, for errors. Fields that are not listed have the same name there.
SCORING_FIELDS = {"token_ids": "tokens.ids"}
GENERATION_FIELDS = {
    "token_ids": "tokens.ids",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "num_candidates": "sampling.n",
    "max_new_tokens": "stopping.max_new_tokens",
    "min_new_tokens": "stopping.min_new_tokens",
    "stop_strings": "stopping.strings",
    "stop_token_ids": "stopping.token_ids",
    "top_logprobs": "output.top_logprobs",
    "prompt_logprobs": "output.prompt_logprobs",
}


def read_generation_request(message: generation_pb2.GenerateRequest) -> GenerationRequest:
    """The message as an internal request. Unset fields get the defaults that the proto file documents."""
    sampling, stopping, output = message.sampling, message.stopping, message.output
    return GenerationRequest(
        adapter_id=message.adapter_id,
        prompts=_read_prompts(message),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else None,
        num_candidates=sampling.n if sampling.HasField("n") else 1,
        max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else None,
        min_new_tokens=stopping.min_new_tokens,
        stop_strings=tuple(stopping.strings),
        stop_token_ids=tuple(stopping.token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop_string=stopping.include_stop_string,
        logprobs=output.logprobs,
        top_logprobs=output.top_logprobs,
        prompt_logprobs=output.prompt_logprobs,
        priority=message.priority,
    )


def read_scoring_request(message: generation_pb2.ScoreRequest) -> ScoringRequest:
    """The message as an internal request."""
    return ScoringRequest(
        adapter_id=message.adapter_id,
        prompts=_read_prompts(message),
        continuations=tuple(
            item.text if item.WhichOneof("content") == "text" else list(item.tokens.ids)
            for item in message.continuations
        ),
        top_logprobs=message.top_logprobs,
    )


def _read_prompts(message: generation_pb2.GenerateRequest | generation_pb2.ScoreRequest) -> tuple[str | list[int], ...]:
    """The prompt; nothing when it is missing."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        return ()
    return (message.text if kind == "text" else list(message.tokens.ids),)
