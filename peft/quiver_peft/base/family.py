"""`Family`: how to read a checkpoint family's config.json, and the table of its tensor names.

The table is used to read checkpoints, to write them, and to map module names of foreign adapters to our sites.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from quiver_peft.base.config import BaseConfig
from quiver_peft.errors import CheckpointError

ConfigT = TypeVar("ConfigT", bound=BaseConfig)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class TensorMapping:
    """One checkpoint tensor: its name there, our parameter, and the part of the parameter's rows it fills.

    part: "" means all rows. transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    """

    theirs: str
    ours: str
    part: str = ""
    transposed: bool = False


@dataclass(frozen=True)
class Family(Generic[ConfigT]):
    """How one `model_type` is read.

    ignored: name endings of buffers in old checkpoints that follow from the configuration.
    prefix: what the language-model class puts before the names; checkpoints of the bare model lack it.
    """

    read_config: Callable[[Mapping[str, Any]], ConfigT]
    tensor_mappings: Callable[[ConfigT], list[TensorMapping]]
    prefix: str
    ignored: tuple[str, ...]


def choose(hf: Mapping[str, Any], key: str, names: Mapping[str, Any]) -> Any:
    """The value of a field, in our words. Raises CheckpointError for one we do not know."""
    value = hf[key]
    if value not in names:
        raise CheckpointError(f"config.json: {key} {value!r} is not supported; known: {', '.join(names)}")
    return names[value]


def require(hf: Mapping[str, Any], key: str, expected: object) -> None:
    """Raises CheckpointError for a field that is there with another value."""
    if hf.get(key, expected) != expected:
        raise CheckpointError(f"config.json: {key} = {hf[key]!r} is not supported; only {expected!r} is")
