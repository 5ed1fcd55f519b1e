"""The methods of an adapter as one JSON object and one set of tensors, whatever they are.

One method is written in its own form: Hugging Face PEFT's where that exists. Several become a composite,

    {"peft_type": "QUIVER_COMPOSITE", "methods": {"lora": {its own form}, "ia3": {...}}}

whose tensors carry the method's name in front: "lora.base_model.model....lora_A.weight".
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from quiver_peft.adapters.formats.hf_ia3 import read_hf_ia3, write_hf_ia3
from quiver_peft.adapters.formats.hf_lora import read_hf_lora
from quiver_peft.adapters.formats.hf_lora_writer import write_hf_lora
from quiver_peft.adapters.formats.hf_prompt import read_hf_prompt, write_hf_prompt
from quiver_peft.adapters.formats.quiver_bottleneck import PEFT_TYPE as BOTTLENECK
from quiver_peft.adapters.formats.quiver_bottleneck import read_bottleneck, write_bottleneck
from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.configs import METHOD_ORDER, PEFTConfig, method_name
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig, PrefixWeights
from quiver_peft.adapters.weights import AdapterWeights, fold_scales
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError

COMPOSITE = "QUIVER_COMPOSITE"
_PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KNOWN_TYPES = ("LORA", "IA3", *_PROMPT_TYPES, BOTTLENECK, COMPOSITE)

Form = tuple[dict[str, Any], dict[str, Tensor]]


def write_methods(base: Base, weights: AdapterWeights, base_name: str) -> Form:
    """adapter_config.json and its tensors."""
    forms = {method_name(config): write_method(base, config, weights, base_name) for config in weights.configs}
    if len(forms) == 1:
        return next(iter(forms.values()))
    tensors = {f"{method}.{name}": tensor for method, (_, found) in forms.items() for name, tensor in found.items()}
    configs = {method: config for method, (config, _) in forms.items()}
    return {"peft_type": COMPOSITE, "base_model_name_or_path": base_name, "methods": configs}, tensors


def write_method(base: Base, config: PEFTConfig, weights: AdapterWeights, base_name: str) -> Form:
    """One method of an adapter in its own form."""
    if isinstance(config, LoraPEFTConfig):
        return write_hf_lora(base, config, weights.lora, base_name)
    if isinstance(config, IA3PEFTConfig):
        return write_hf_ia3(base, config, weights.ia3, base_name)
    if isinstance(config, CanonicalAdaptersPEFTConfig):
        return write_bottleneck(base, config, weights.bottlenecks, base_name)
    if isinstance(config, PrefixPEFTConfig):
        assert weights.prefix is not None
        return write_hf_prompt(base, config, weights.prefix, base_name)
    assert weights.prompt is not None
    return write_hf_prompt(base, config, weights.prompt, base_name)


def read_methods(base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterWeights:
    """Validated weights, without a revision yet. Raises AdapterError; BaseMismatchError."""
    weights = AdapterWeights("", ())
    if config.get("peft_type") == COMPOSITE:
        for method, (part, found) in _split(config, tensors).items():
            try:
                weights = _read_one(base, part, found, weights)
            except AdapterError as error:
                raise type(error)(f"method {method!r}: {error}") from None
            if weights.methods[-1] != method:
                raise AdapterError(f"adapter_config.json: methods[{method!r}] holds {weights.methods[-1]!r}")
    else:
        weights = _read_one(base, config, tensors, weights)
    return replace(weights, scales=fold_scales(base, weights.lora, weights.ia3))


def _split(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """The form of each method, in the order in which they act."""
    methods: Any = config.get("methods")
    if not isinstance(methods, dict) or len(methods) < 2:
        raise AdapterError(f"adapter_config.json: methods must be an object of at least two methods, not {methods!r}")
    forms: dict[str, Form] = {}
    for method in methods:
        if method not in METHOD_ORDER or not isinstance(methods[method], dict):
            raise AdapterError(
                f"adapter_config.json: methods[{method!r}] is not known; they are {', '.join(METHOD_ORDER)}"
            )
    for method in METHOD_ORDER:
        if method in methods:
            forms[method] = (methods[method], {})
    for name, tensor in tensors.items():
        method, _, rest = name.partition(".")
        if method not in forms:
            raise AdapterError(
                f"adapter_model.safetensors: tensor {name!r} belongs to no method of adapter_config.json; "
                "nothing may be left unapplied"
            )
        forms[method][1][rest] = tensor
    return forms


def _read_one(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: AdapterWeights
) -> AdapterWeights:
    """`weights` with one more method."""
    kind = config.get("peft_type")
    if kind == "LORA":
        found, lora = read_hf_lora(base, config, tensors)
        return replace(weights, configs=(*weights.configs, found), lora=lora)
    if kind == "IA3":
        found, ia3 = read_hf_ia3(base, config, tensors)
        return replace(weights, configs=(*weights.configs, found), ia3=ia3)
    if kind == BOTTLENECK:
        found, bottlenecks = read_bottleneck(base, config, tensors)
        return replace(weights, configs=(*weights.configs, found), bottlenecks=bottlenecks)
    if kind in _PROMPT_TYPES:
        found, virtual = read_hf_prompt(base, config, tensors)
        if isinstance(virtual, PrefixWeights):
            return replace(weights, configs=(*weights.configs, found), prefix=virtual)
        if weights.prompt is not None:
            raise AdapterError("adapter_config.json: an adapter holds one soft prompt at most")
        return replace(weights, configs=(*weights.configs, found), prompt=virtual)
    raise AdapterError(f"adapter_config.json: peft_type {kind!r} is not supported; known: {', '.join(KNOWN_TYPES)}")
