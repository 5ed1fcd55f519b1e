"""HTTP parameters: reads the JSON bodies of OpenAI's API into the internal request type.

Parameters that are not supported are refused by name. Values are checked here for their type alone. Their
rules are checked in `quiver_server.requests.validation`.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from quiver_server.errors import InvalidRequestError
from quiver_server.requests.prompt_request import GenerationRequest

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1
_FLOAT32 = struct.Struct("f")
_OPENAI_TEMPERATURE = 1.0  # the default of OpenAI's API; gRPC's is 0


class UnsupportedError(InvalidRequestError):
    """A parameter that this server does not have, of OpenAI's API or not."""

    reason = "UNSUPPORTED_PARAMETER"


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed body.

    request: without its adapter_id, which is looked up by `model`; of a chat, also without its prompt. field_names: the
    parameters that set the request's fields, for errors. echo: whether each choice begins with its prompt.
    """

    request: GenerationRequest
    field_names: dict[str, str]
    model: str
    stream: bool
    include_usage: bool
    return_token_ids: bool
    echo: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter that sets a field of GenerationRequest. read: of a JSON value; raises ValueError with the rule."""

    field: str
    read: Callable[[Any], Any]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    try:
        # The precision that gRPC has: a request gives the same tokens over both APIs, and the sampler counts on it.
        return _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    except (OverflowError, struct.error):
        raise ValueError("a finite number of single precision") from None


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


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in cast(list[object], values)):
        raise ValueError("a text or a list of texts")
    return tuple(cast(list[str], values))


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("a list of token ids")
    return [_whole(item) for item in cast(list[object], value)]


_COMMON = {
    "temperature": Parameter("temperature", _number),
    "top_p": Parameter("top_p", _number),
    "n": Parameter("num_candidates", _whole),
    "seed": Parameter("seed", _up_to(_MAX_UINT64)),
    "presence_penalty": Parameter("presence_penalty", _number),
    "frequency_penalty": Parameter("frequency_penalty", _number),
    "max_tokens": Parameter("max_new_tokens", _whole),
    "stop": Parameter("stop_strings", _texts),
    # Extensions, under vLLM's names.
    "top_k": Parameter("top_k", _whole),
    "min_p": Parameter("min_p", _number),
    "repetition_penalty": Parameter("repetition_penalty", _number),
    "min_tokens": Parameter("min_new_tokens", _whole),
    "stop_token_ids": Parameter("stop_token_ids", lambda value: tuple(_token_ids(value))),
    "ignore_eos": Parameter("ignore_eos", _flag),
    "include_stop_str_in_output": Parameter("include_stop_string", _flag),
}
COMPLETION_PARAMETERS = {**_COMMON, "logprobs": Parameter("top_logprobs", _whole)}
CHAT_PARAMETERS = {
    **_COMMON,
    "max_completion_tokens": Parameter("max_new_tokens", _whole),
    "logprobs": Parameter("logprobs", _flag),
    "top_logprobs": Parameter("top_logprobs", _whole),
}
# Read elsewhere, or without effect on the answer.
_NOT_SAMPLING = {"model", "stream", "stream_options", "return_token_ids", "user", "safety_identifier"}
# Not supported, but clients send them with these values, which have no effect.
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


def read_completion(body: Mapping[str, Any]) -> ParsedRequest:
    """Read the body of a completion. Raises InvalidRequestError."""
    given = {name: value for name, value in body.items() if value is not None}
    echo = _read("echo", given.pop("echo", False), _flag)
    fields, names = _read_fields(given, "prompt", COMPLETION_PARAMETERS)
    # A number of alternatives, which may be 0, asks for log-probabilities.
    fields["logprobs"] = "logprobs" in given
    if echo and fields["logprobs"]:
        fields["prompt_logprobs"] = True
        names["prompt_logprobs"] = "echo"
    if echo and given.get("max_tokens") == 0:
        fields |= {"is_generation": False, "max_new_tokens": 1}  # scoring drops the one token
    fields["prompts"] = _read_prompts(given.get("prompt"))
    return _parsed(given, fields, names, echo=echo)


def read_chat(body: Mapping[str, Any]) -> ParsedRequest:
    """Read the body of a chat completion, except for its messages. Raises InvalidRequestError."""
    given = {name: value for name, value in body.items() if value is not None}
    fields, names = _read_fields(given, "messages", CHAT_PARAMETERS)
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise InvalidRequestError("give one of max_tokens and max_completion_tokens", "max_completion_tokens")
    # The template writes the special tokens itself.
    return _parsed(given, {**fields, "add_special_tokens": False}, names, echo=False)


def _read_fields(
    given: Mapping[str, Any], prompt: str, parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The request's fields, and the parameters that set them. prompt: the name of the parameter with the prompt."""
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model is missing: name an adapter or the base; /v1/models lists them", "model")
    fields: dict[str, Any] = {"temperature": _OPENAI_TEMPERATURE}
    names = {"adapter_id": "model", "prompt": prompt, "text": prompt, "token_ids": prompt}
    for name, value in given.items():
        if name in parameters:
            field = parameters[name].field
            fields[field] = _read(name, value, parameters[name].read)
            names[field] = name
        elif name not in _NOT_SAMPLING and name != prompt and value not in _NEUTRAL_VALUES.get(name, ()):
            raise UnsupportedError(f"{name} is not supported by this server; leave it out", name)
    return fields, names


def _parsed(given: Mapping[str, Any], fields: dict[str, Any], names: dict[str, str], *, echo: bool) -> ParsedRequest:
    stream = _read("stream", given.get("stream", False), _flag)
    return ParsedRequest(
        GenerationRequest(**fields),
        names,
        given["model"],
        stream,
        _include_usage(given.get("stream_options"), stream),
        _read("return_token_ids", given.get("return_token_ids", False), _flag),
        echo,
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


def _read_prompts(value: Any) -> tuple[str | list[int], ...]:
    """A text, a list of token ids, or a list of several of these."""
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    if isinstance(value, list) and not any(isinstance(item, str | list) for item in items):
        items = [items]  # one prompt of token ids
    return tuple(_read_prompt(item, f"prompt[{i}]" if len(items) > 1 else "prompt") for i, item in enumerate(items))


def _read_prompt(value: Any, where: str) -> str | list[int]:
    if isinstance(value, str):
        return value
    try:
        return _token_ids(value)
    except ValueError:
        raise InvalidRequestError(f"{where} must be a text or a list of token ids", where) from None
