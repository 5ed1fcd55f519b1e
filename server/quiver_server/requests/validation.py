"""Validation: checks every rule of a request, tokenizes its prompts and fills in defaults. Knows no API's messages."""

import math
import secrets
from dataclasses import replace

from quiver_peft.tokenizer import Tokenizer
from quiver_server.engine.sequence import SamplingParams
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
from quiver_server.requests.prompt_request import (
    SCORING_PARAMS,
    GenerationRequest,
    PromptRequest,
    ScoringRequest,
    add_prompt_index,
)


def validate(
    request: GenerationRequest | ScoringRequest, tokenizer: Tokenizer, limits: Limits
) -> tuple[PromptRequest, ...]:
    """The valid requests, one for each prompt. Raises InvalidRequestError, which names the field."""
    if not request.prompts:
        raise InvalidRequestError("the prompt is missing: set text or tokens", "prompt")
    if isinstance(request, ScoringRequest):
        return (_validate_scoring(request, tokenizer, limits),)
    valid: list[PromptRequest] = []
    for i, prompt in enumerate(request.prompts):
        try:
            tokens = _tokenize_prompt(prompt, tokenizer, limits, add_special_tokens=request.add_special_tokens)
        except InvalidRequestError as error:
            add_prompt_index(error, i, len(request.prompts))
            raise
        valid.append(_validate_prompt(request, tokens, limits))
    return tuple(valid)


def _validate_prompt(request: GenerationRequest, prompt: list[int], limits: Limits) -> PromptRequest:
    rule = "unset: an encoder-decoder reads its prompt and predicts none of it"
    require(not request.prompt_logprobs or limits.max_source_length is None, "prompt_logprobs", "set", rule)
    params = _validate_params(request, limits, room=limits.context_length - len(prompt))
    number = request.num_candidates
    require(1 <= number <= MAX_CANDIDATES, "num_candidates", number, f"from 1 to {MAX_CANDIDATES}")
    is_varied = number == 1 or not params.greedy
    require(is_varied, "num_candidates", f"{number} with temperature 0", "1: all candidates would be the same")
    in_range = -MAX_PRIORITY <= request.priority <= MAX_PRIORITY
    require(in_range, "priority", request.priority, f"from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    _check_stop_strings(request.stop_strings)
    valid = PromptRequest(
        adapter_id=request.adapter_id,
        prompt=prompt,
        params=params,
        num_candidates=number,
        stop_strings=request.stop_strings,
        include_stop_string=request.include_stop_string,
        priority=request.priority,
    )
    return valid if request.is_generation else valid.as_scoring_request()


def _validate_scoring(request: ScoringRequest, tokenizer: Tokenizer, limits: Limits) -> PromptRequest:
    prompt = _tokenize_prompt(request.prompts[0], tokenizer, limits)
    number = len(request.continuations)
    require(1 <= number <= MAX_CONTINUATIONS, "continuations", number, f"from 1 to {MAX_CONTINUATIONS} of them")
    continuations = tuple(
        _tokenize_continuation(item, f"continuations[{i}]", tokenizer, limits)
        for i, item in enumerate(request.continuations)
    )
    _check_top_logprobs(request.top_logprobs)
    valid = PromptRequest(
        adapter_id=request.adapter_id,
        prompt=prompt,
        params=replace(SCORING_PARAMS, num_top_logprobs=max(request.top_logprobs, 1)),
        num_candidates=number,
        continuations=continuations,
        is_generation=False,
    )
    if len(prompt) + valid.max_output_tokens > limits.context_length:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; with {valid.describe_output} it must fit into the context of "
            f"{limits.context_length}",
            "continuations",
        )
    return valid


def _tokenize_prompt(
    prompt: str | list[int], tokenizer: Tokenizer, limits: Limits, *, add_special_tokens: bool = True
) -> list[int]:
    is_text = isinstance(prompt, str)
    field = "text" if is_text else "token_ids"
    if is_text:
        limits.check_text(prompt, field)
    tokens = tokenizer.encode(prompt, add_special_tokens=add_special_tokens) if is_text else prompt
    if not prompt or not tokens:
        raise InvalidRequestError("the prompt is empty; it must have at least one token", field)
    limits.check_prompt_length(len(tokens), field)
    limits.check_tokens(tokens, field)
    return tokens


def _tokenize_continuation(value: str | list[int], field: str, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    is_text = isinstance(value, str)
    if is_text:
        limits.check_text(value, field)
    tokens = tokenizer.encode(value, add_special_tokens=False) if is_text else value
    require(bool(tokens), field, "empty", "at least one token")
    limits.check_tokens(tokens, field)
    return tokens


def _validate_params(request: GenerationRequest, limits: Limits, room: int) -> SamplingParams:
    """room: how many tokens fit into the context after the prompt."""
    temperature, repetition = request.temperature, request.repetition_penalty
    require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "0 or more")
    require(0 < request.top_p <= 1, "top_p", request.top_p, "above 0 and at most 1")
    require(0 <= request.min_p <= 1, "min_p", request.min_p, "from 0 to 1")
    require(math.isfinite(repetition) and repetition > 0, "repetition_penalty", repetition, "above 0")
    presence, frequency = request.presence_penalty, request.frequency_penalty
    require(-2 <= presence <= 2, "presence_penalty", presence, "from -2 to 2")
    require(-2 <= frequency <= 2, "frequency_penalty", frequency, "from -2 to 2")
    wanted = limits.default_max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    limits.check_new_tokens(wanted)
    least = request.min_new_tokens
    require(least <= wanted, "min_new_tokens", least, f"at most {wanted}, max_new_tokens")
    eos_ids = frozenset[int]() if request.ignore_eos else limits.eos_ids
    stop_ids = _check_stop_token_ids(request, eos_ids, limits)
    _check_top_logprobs(request.top_logprobs)
    return SamplingParams(
        temperature=temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        seed=secrets.randbits(64) if request.seed is None else request.seed,
        max_new_tokens=min(wanted, room),
        min_new_tokens=least,
        stop_ids=stop_ids,
        eos_ids=eos_ids,
        num_top_logprobs=request.top_logprobs if request.logprobs or request.top_logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )


def _check_stop_token_ids(request: GenerationRequest, eos_ids: frozenset[int], limits: Limits) -> frozenset[int]:
    field, number = "stop_token_ids", len(request.stop_token_ids)
    require(number <= MAX_STOP_TOKENS, field, number, f"at most {MAX_STOP_TOKENS} tokens")
    limits.check_tokens(request.stop_token_ids, field)
    stop_ids = frozenset(request.stop_token_ids)
    leaves_some = len(stop_ids | eos_ids) < limits.vocab_size
    require(leaves_some or not request.min_new_tokens, field, "the whole vocabulary", "less, with min_new_tokens")
    return stop_ids


def _check_stop_strings(strings: tuple[str, ...]) -> None:
    field = "stop_strings"
    require(len(strings) <= MAX_STOP_STRINGS, field, len(strings), f"at most {MAX_STOP_STRINGS} strings")
    require(all(strings), field, "an empty string", "without empty strings")
    longest = max(map(len, strings), default=0)
    rule = f"at most {MAX_STOP_CHARACTERS} characters each"
    require(longest <= MAX_STOP_CHARACTERS, field, f"a string of {longest} characters", rule)


def _check_top_logprobs(number: int) -> None:
    require(number <= MAX_TOP_LOGPROBS, "top_logprobs", number, f"at most {MAX_TOP_LOGPROBS}")
