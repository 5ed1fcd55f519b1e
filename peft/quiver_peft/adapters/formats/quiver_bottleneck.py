"""Canonical adapters on disk, for which Hugging Face PEFT has no form: Quiver's own, read strictly.

adapter_config.json: `"peft_type": "QUIVER_BOTTLENECK"` and the fields of `CanonicalAdaptersPEFTConfig`.
Tensors: layers.3.attention.{down,up}.weight, with `bias` also .{down,up}.bias, with a norm .norm.{weight,bias}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from quiver_peft.adapters.methods.bottleneck import (
    BottleneckWeights,
    CanonicalAdaptersPEFTConfig,
    SublayerBiases,
    bottleneck_shapes,
    bottleneck_sites,
    place_of_site,
    weights_at_site,
)
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError

PEFT_TYPE = "QUIVER_BOTTLENECK"
_ABOUT = {"peft_type", "base_model_name_or_path", "hidden_size"}
_NUMBERS: dict[str, type[int] | tuple[type, ...]] = {
    "adapter_dim": int,
    "adapter_dropout": (int, float),
    "scale": (int, float),
    "weight_tying": bool,
    "bias": bool,
}


def write_bottleneck(
    base: Base, config: CanonicalAdaptersPEFTConfig, weights: Sequence[BottleneckWeights], base_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and its tensors; tied bottlenecks are written at every site."""
    settings = config.to_dict()
    del settings["method"]
    about = {"peft_type": PEFT_TYPE, "base_model_name_or_path": base_name, "hidden_size": base.config.hidden_size}
    tensors = {f"{item.site}.{name}": tensor for item in weights for name, tensor in item.tensors().items()}
    return {**about, **settings}, tensors


def read_bottleneck(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[CanonicalAdaptersPEFTConfig, tuple[BottleneckWeights, ...]]:
    """Validated weights for `base`. Raises AdapterError; BaseMismatchError."""
    found = _read_config(config)
    hidden_size = base.config.hidden_size
    if config.get("hidden_size") != hidden_size:
        raise BaseMismatchError(
            f"adapter_config.json: hidden_size {config.get('hidden_size')!r} is another base's; this one has "
            f"{hidden_size}"
        )
    shapes = bottleneck_shapes(found, hidden_size)
    sites = [site.name for site in bottleneck_sites(base, found)]
    expected = {f"{site}.{name}": shape for site in sites for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name not in expected:
            raise AdapterError(
                f"adapter_model.safetensors: tensor {name!r} has no place by adapter_config.json on this base; "
                "nothing may be left unapplied"
            )
        if tuple(tensor.shape) != expected[name]:
            raise AdapterError(
                f"adapter_model.safetensors: tensor {name!r} has shape {list(tensor.shape)}, not {list(expected[name])}"
            )
    for name in expected:
        if name not in tensors:
            raise AdapterError(f"adapter_model.safetensors: tensor {name!r} is missing")
    if found.weight_tying and not are_tied(tensors):
        raise AdapterError("adapter_model.safetensors: weight_tying is set, but the layers' bottlenecks differ")
    return found, tuple(bottleneck_weights(base, found, tensors))


def are_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all layers hold the same bottleneck at the same place, as `weight_tying` leaves them."""
    first: dict[str, Tensor] = {}
    return all(torch.equal(tensor, first.setdefault(place_of_site(name), tensor)) for name, tensor in tensors.items())


def bottleneck_weights(
    base: Base, config: CanonicalAdaptersPEFTConfig, tensors: Mapping[str, Tensor]
) -> list[BottleneckWeights]:
    """The weights of a configuration, every tensor there and well-shaped, by the names given above."""
    names, out_biases = bottleneck_shapes(config, base.config.hidden_size), SublayerBiases(base, config)
    found: list[BottleneckWeights] = []
    for site in (site.name for site in bottleneck_sites(base, config)):
        out_bias = out_biases.at(site)
        out_bias = None if out_bias is None else to_host_fp32(out_bias)
        values = {name: tensors[f"{site}.{name}"].float() for name in names}
        found.append(BottleneckWeights(site, weights_at_site(config, values, out_bias)))
    return found


def _read_config(config: Mapping[str, Any]) -> CanonicalAdaptersPEFTConfig:
    known = {field.name for field in fields(CanonicalAdaptersPEFTConfig)}
    for key, value in config.items():
        if key not in known and key not in _ABOUT:
            raise AdapterError(f"adapter_config.json: {key} = {value!r} is not a field of {PEFT_TYPE}")
        if key in _NUMBERS and (not isinstance(value, _NUMBERS[key]) or (_NUMBERS[key] is int and value is True)):
            raise AdapterError(f"adapter_config.json: {key} = {value!r} has the wrong type")
    for key, kind in (("places", str), ("layer_selection", int)):
        value = config.get(key)
        if value is not None and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            raise AdapterError(f"adapter_config.json: {key} must be a list of {kind.__name__}, not {value!r}")
    if "adapter_dim" not in config:
        raise AdapterError("adapter_config.json: adapter_dim is missing")
    try:
        return CanonicalAdaptersPEFTConfig(**{key: value for key, value in config.items() if key in known})
    except (AdapterError, TypeError) as error:
        raise AdapterError(f"adapter_config.json: {error}") from None
