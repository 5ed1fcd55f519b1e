"""What an OpenAI request may say, and the wire's request that it becomes. What is not supported is refused by name.

Values are checked here for their kind alone: the rules they must keep are the wire's, checked where gRPC's are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from quiver.v1 import generation_pb2
from quiver_server.errors import InvalidRequestError

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1
_OPENAI_TEMPERATURE = 1.0  # where a request does not say: OpenAI's clients expect draws, gRPC's greedy ones


class UnsupportedError(InvalidRequestError):
    """A parameter of OpenAI's API, or of nobody's, that this server does not have."""

    reason = "UNSUPPORTED_PARAMETER"


@dataclass(frozen=True)
class ParsedRequest:
    """A request, read.

    message: without its prompt and its adapter_id, which is made of `model` by who knows the models. names: of the
    message's fields that the client set, as it spelled them. echo: whether each choice begins with its prompt. draws:
    whether tokens are generated: with echo, 0 of them may be asked for.
    """

    message: generation_pb2.GenerateRequest
    names: dict[str, str]
    model: str
    stream: bool
    include_usage: bool
    return_token_ids: bool
    echo: bool
    is_generation: bool


@dataclass(frozen=True)
class Parameter:
    """One that maps to a field of GenerateRequest. read: of a JSON value; raises ValueError with the rule."""

    field: str
    read: Callable[[Any], Any]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number that a computer can hold") from None


def _up_to(limit: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise ValueError(f"a whole number from 0 to {limit}")
        return value

    return read


_whole = _up_to(_MAX_UINT32)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in cast(list[object], values)):
        raise ValueError("a text or a list of texts")
    return cast(list[str], values)


def token_ids(value: Any) -> list[int]:
    """A list of token ids. Raises ValueError with the rule."""
    if not isinstance(value, list):
        raise ValueError("a list of token ids")
    return [_whole(item) for item in cast(list[object], value)]


_COMMON = {
    "temperature": Parameter("sampling.temperature", _number),
    "top_p": Parameter("sampling.top_p", _number),
    "n": Parameter("sampling.n", _whole),
    "seed": Parameter("sampling.seed", _up_to(_MAX_UINT64)),
    "presence_penalty": Parameter("sampling.presence_penalty", _number),
    "frequency_penalty": Parameter("sampling.frequency_penalty", _number),
    "max_tokens": Parameter("stopping.max_new_tokens", _whole),
    "stop": Parameter("stopping.strings", _texts),
    # Beyond OpenAI's, under the names that vLLM gave them.
    "top_k": Parameter("sampling.top_k", _whole),
    "min_p": Parameter("sampling.min_p", _number),
    "repetition_penalty": Parameter("sampling.repetition_penalty", _number),
    "min_tokens": Parameter("stopping.min_new_tokens", _whole),
    "stop_token_ids": Parameter("stopping.token_ids", token_ids),
    "ignore_eos": Parameter("stopping.ignore_eos", _flag),
    "include_stop_str_in_output": Parameter("stopping.include_stop_string", _flag),
}
COMPLETION_PARAMETERS = {**_COMMON, "logprobs": Parameter("output.top_logprobs", _whole)}
CHAT_PARAMETERS = {
    **_COMMON,
    "max_completion_tokens": Parameter("stopping.max_new_tokens", _whole),
    "logprobs": Parameter("output.logprobs", _flag),
    "top_logprobs": Parameter("output.top_logprobs", _whole),
}
# About the answer's form, or about nothing that an answer depends on.
_UNSUPPORTED = {"model", "stream", "stream_options", "return_token_ids", "user", "safety_identifier"}
# Not supported, but clients send them with values that ask for nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
}


def read_parameters(body: Mapping[str, Any], prompt: str, parameters: Mapping[str, Parameter]) -> ParsedRequest:
    """All but the prompt, whose parameter is called `prompt`. Raises InvalidRequestError."""
    given = {name: value for name, value in body.items() if value is not None}
    is_chat = parameters is CHAT_PARAMETERS
    echo = not is_chat and _read("echo", given.pop("echo", False), _flag)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model is missing: name an adapter or the base; /v1/models lists them", "model")
    message = generation_pb2.GenerateRequest()
    message.sampling.temperature = _OPENAI_TEMPERATURE
    names = {"adapter_id": "model", "prompt": prompt, "text": prompt, "tokens.ids": prompt}
    for name in [name for name in given if name not in _UNSUPPORTED and name != prompt]:
        if name in parameters:
            _set(message, parameters[name].field, _read(name, given[name], parameters[name].read))
            names[parameters[name].field] = name
        elif given[name] not in _NEUTRAL_VALUES.get(name, ()):
            raise UnsupportedError(f"{name} is not supported by this server; leave it out", name)
    if "logprobs" in given and not is_chat:
        message.output.logprobs = True  # a number there, which may be 0: no alternatives
    if echo and message.output.logprobs:
        message.output.prompt_logprobs = True
        names["output.prompt_logprobs"] = "echo"
    draws = not echo or given.get("max_tokens") != 0
    if not draws:
        message.stopping.max_new_tokens = 1  # which is thrown away
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise InvalidRequestError("give one of max_tokens and max_completion_tokens", "max_completion_tokens")
    stream = _read("stream", given.get("stream", False), _flag)
    return ParsedRequest(
        message,
        names,
        model,
        stream,
        _include_usage(given.get("stream_options"), stream),
        _read("return_token_ids", given.get("return_token_ids", False), _flag),
        echo,
        draws,
    )


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options is for streams; leave it out or set stream", "stream_options")
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options must be an object", "stream_options")
    settings = cast(dict[str, Any], options)
    for name in settings.keys() - {"include_usage"}:
        if settings[name]:
            raise UnsupportedError(f"stream_options.{name} is not supported by this server; leave it out", name)
    return _read("stream_options.include_usage", settings.get("include_usage") or False, _flag)


def _read(name: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError as rule:
        raise InvalidRequestError(f"{name} must be {rule}", name) from None


def _set(message: generation_pb2.GenerateRequest, field: str, value: Any) -> None:
    group, _, name = field.partition(".")
    part: Any = getattr(message, group)
    if isinstance(value, list):
        getattr(part, name).extend(cast(list[object], value))
    else:
        setattr(part, name, value)
