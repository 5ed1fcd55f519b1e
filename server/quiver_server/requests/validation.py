"""Between the wire's messages and the engine's dataclasses: every rule a request must keep is checked here."""

import math
import secrets
from collections.abc import Sequence as Seq
from dataclasses import replace

from quiver.v1 import generation_pb2
from quiver_peft.tokenizer import Tokenizer
from quiver_server.engine.sequence import FinishReason, SamplingParams, TokenLogprob
from quiver_server.errors import InvalidRequestError, require
from quiver_server.requests.limits import (
    MAX_CANDIDATES,
    MAX_CONTINUATIONS,
    MAX_PRIORITY,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TOP_LOGPROBS,
    Limits,
)
from quiver_server.requests.prompt_request import SCORING_PARAMS, PromptRequest

FINISH_REASONS = {
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def parse_generate_request(
    message: generation_pb2.GenerateRequest, tokenizer: Tokenizer, limits: Limits
) -> PromptRequest:
    """Check a request and fill in its defaults. Raises InvalidRequestError, which names the field."""
    prompt = _read_prompt(message, tokenizer, limits)
    if message.output.prompt_logprobs and limits.max_source_length is not None:
        raise InvalidRequestError(
            "output.prompt_logprobs is set; an encoder-decoder reads its prompt and predicts none of it",
            "output.prompt_logprobs",
        )
    params = _read_params(message, limits, room=limits.context_length - len(prompt))
    num_candidates = message.sampling.n if message.sampling.HasField("n") else 1
    require(1 <= num_candidates <= MAX_CANDIDATES, "sampling.n", num_candidates, f"from 1 to {MAX_CANDIDATES}")
    if num_candidates > 1 and params.greedy:
        raise InvalidRequestError(
            f"sampling.n is {num_candidates} with temperature 0: all candidates would be the same", "sampling.n"
        )
    in_range = -MAX_PRIORITY <= message.priority <= MAX_PRIORITY
    require(in_range, "priority", message.priority, f"from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    strings = _read_stop_strings(message.stopping)
    return PromptRequest(
        message.adapter_id,
        prompt,
        params,
        num_candidates,
        strings,
        message.stopping.include_stop_string,
        message.priority,
    )


def parse_score_request(message: generation_pb2.ScoreRequest, tokenizer: Tokenizer, limits: Limits) -> PromptRequest:
    """Check a request to score. Raises InvalidRequestError, which names the field."""
    prompt = _read_prompt(message, tokenizer, limits)
    number = len(message.continuations)
    require(1 <= number <= MAX_CONTINUATIONS, "continuations", number, f"from 1 to {MAX_CONTINUATIONS} of them")
    continuations = tuple(
        _read_continuation(item, f"continuations[{i}]", tokenizer, limits)
        for i, item in enumerate(message.continuations)
    )
    _check_top_logprobs(message.top_logprobs, "top_logprobs")
    asked = PromptRequest(
        message.adapter_id,
        prompt,
        replace(SCORING_PARAMS, num_top_logprobs=max(message.top_logprobs, 1)),
        number,
        (),
        False,
        continuations=continuations,
        is_generation=False,
    )
    if len(prompt) + asked.max_output_tokens > limits.context_length:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; with {asked.describe_output} it must fit into the context of "
            f"{limits.context_length}",
            "continuations",
        )
    return asked


def _read_continuation(
    message: generation_pb2.Continuation, field: str, tokenizer: Tokenizer, limits: Limits
) -> list[int]:
    is_text = message.WhichOneof("content") == "text"
    if is_text:
        limits.check_text(message.text, field)
    tokens = tokenizer.encode(message.text, add_special_tokens=False) if is_text else list(message.tokens.ids)
    if not tokens:
        raise InvalidRequestError(f"{field} is empty; it must have at least one token", field)
    limits.check_tokens(tokens, field)
    return tokens


def _read_prompt(
    message: generation_pb2.GenerateRequest | generation_pb2.ScoreRequest, tokenizer: Tokenizer, limits: Limits
) -> list[int]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("the prompt is missing: set text or tokens", "prompt")
    field = "text" if kind == "text" else "tokens.ids"
    if kind == "text":
        limits.check_text(message.text, field)
    prompt = tokenizer.encode(message.text) if kind == "text" else list(message.tokens.ids)
    if not (message.text if kind == "text" else prompt) or not prompt:
        raise InvalidRequestError("the prompt is empty; it must have at least one token", field)
    limits.check_prompt_length(len(prompt), field)
    limits.check_tokens(prompt, field)
    return prompt


def _read_params(message: generation_pb2.GenerateRequest, limits: Limits, room: int) -> SamplingParams:
    sampling, stopping, output = message.sampling, message.stopping, message.output
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    wanted = stopping.max_new_tokens if stopping.HasField("max_new_tokens") else limits.default_max_new_tokens
    finite = math.isfinite
    require(
        finite(sampling.temperature) and sampling.temperature >= 0,
        "sampling.temperature",
        sampling.temperature,
        "0 or more",
    )
    require(0 < top_p <= 1, "sampling.top_p", top_p, "above 0 and at most 1")
    require(0 <= sampling.min_p <= 1, "sampling.min_p", sampling.min_p, "from 0 to 1")
    require(finite(repetition) and repetition > 0, "sampling.repetition_penalty", repetition, "above 0")
    for name, value in (("presence", sampling.presence_penalty), ("frequency", sampling.frequency_penalty)):
        require(-2 <= value <= 2, f"sampling.{name}_penalty", value, "from -2 to 2")
    limits.check_new_tokens(wanted)
    require(
        stopping.min_new_tokens <= wanted,
        "stopping.min_new_tokens",
        stopping.min_new_tokens,
        f"at most {wanted}, max_new_tokens",
    )
    eos_ids = frozenset[int]() if stopping.ignore_eos else limits.eos_ids
    stop_ids = _read_stop_ids(stopping, eos_ids, limits)
    _check_top_logprobs(output.top_logprobs, "output.top_logprobs")
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
        stop_ids=stop_ids,
        eos_ids=eos_ids,
        num_top_logprobs=output.top_logprobs if output.logprobs or output.top_logprobs else None,
        prompt_logprobs=output.prompt_logprobs,
    )


def _read_stop_ids(stopping: generation_pb2.Stopping, eos_ids: frozenset[int], limits: Limits) -> frozenset[int]:
    field, number = "stopping.token_ids", len(stopping.token_ids)
    require(number <= MAX_STOP_TOKENS, field, number, f"at most {MAX_STOP_TOKENS} tokens")
    limits.check_tokens(stopping.token_ids, field)
    stop_ids = frozenset(stopping.token_ids)
    leaves_some = len(stop_ids | eos_ids) < limits.vocab_size
    require(leaves_some or not stopping.min_new_tokens, field, "the whole vocabulary", "less, with min_new_tokens")
    return stop_ids


def _read_stop_strings(stopping: generation_pb2.Stopping) -> tuple[str, ...]:
    field, strings = "stopping.strings", tuple(stopping.strings)
    require(len(strings) <= MAX_STOP_STRINGS, field, len(strings), f"at most {MAX_STOP_STRINGS} strings")
    require(all(strings), field, "an empty string", "without empty strings")
    longest = max(map(len, strings), default=0)
    rule = f"at most {MAX_STOP_CHARACTERS} characters each"
    require(longest <= MAX_STOP_CHARACTERS, field, f"a string of {longest} characters", rule)
    return strings


def _check_top_logprobs(number: int, field: str) -> None:
    require(number <= MAX_TOP_LOGPROBS, field, number, f"at most {MAX_TOP_LOGPROBS}")


def logprob_message(item: TokenLogprob) -> generation_pb2.TokenLogprob:
    """A log-probability as the wire says it."""
    top = [generation_pb2.Alternative(token_id=token, logprob=value) for token, value in item.top]
    return generation_pb2.TokenLogprob(token_id=item.token_id, logprob=item.logprob, top=top)


def fill_score(message: generation_pb2.Score, logprobs: Seq[TokenLogprob], num_top: int) -> None:
    """The score of a continuation from its tokens' log-probabilities, each with at least one alternative."""
    message.logprobs.extend(logprob_message(replace(item, top=item.top[:num_top])) for item in logprobs)
    message.total_logprob = math.fsum(item.logprob for item in logprobs)
    message.is_greedy = all(item.top[0][0] == item.token_id for item in logprobs)
