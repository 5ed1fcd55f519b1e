"""AdapterHub's bottleneck adapters (`double_seq_bn`, `seq_bn`, `par_bn` and their like) as canonical ones; strictly.

Format: adapters 1.3 `save_adapter`: adapter_config.json with the settings under "config", and adapter.safetensors, or a
pickle. Tensors carry the adapter's name: transformer.h.0.output_adapters.adapters.NAME.adapter_down.0.weight.
Mathematics: adapters 1.3 `adapters.methods.modeling.Adapter`; in bases that normalise first, `original_ln_before` adds
the residual stream to what enters, and `original_ln_after` to what comes out, as every base does anyway.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor

from quiver_peft.adapters.formats.quiver_bottleneck import PEFT_TYPE
from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Site
from quiver_peft.errors import AdapterError, BaseMismatchError

WEIGHTS_FILE = "adapter.safetensors"
_TENSOR = re.compile(r"(?P<place>.+)\.adapters\.[^.]+\.adapter_(?P<part>down\.0|up)\.(?P<kind>weight|bias)")
_ACTIVATIONS = {"relu": "relu", "swish": "swish", "silu": "swish", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_PLACES = {"mh_adapter": "attention", "cross_adapter": "cross_attention", "output_adapter": "mlp"}
_READ = {*_PLACES, "reduction_factor", "non_linearity", "scaling", "is_parallel", "leave_out", "dropout"}
# What they must be, lest the result were another; the rest is about training, or about what is off by these.
_REQUIRED: dict[str, object] = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "inv_adapter": None,
    "phm_layer": False,
    "use_gating": False,
}
_HARMLESS = {
    *("adapter_residual_before_ln", "original_ln_before", "init_weights", "init_weights_seed", "stochastic_depth"),
    *("inv_adapter_reduction_factor", "hypercomplex_nonlinearity", "learn_phm", "factorized_phm_W"),
    *("factorized_phm_rule", "phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm"),
    *("shared_phm_rule", "architecture"),
}
_KNOWN_FAMILIES = ("gpt2", "llama", "mistral", "t5", "mt5")


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of theirs."""
    return "peft_type" not in config and isinstance(config.get("config"), dict) and "model_class" in config


def from_adapterhub(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our own form of it, to be validated like any other. Raises AdapterError; BaseMismatchError."""
    if base.config.family not in _KNOWN_FAMILIES:
        raise AdapterError(
            f"adapter_config.json: AdapterHub's adapters are read for {', '.join(_KNOWN_FAMILIES)}, "
            f"not for {base.config.family}"
        )
    hidden_size = base.config.hidden_size
    if config.get("hidden_size") != hidden_size:
        raise BaseMismatchError(
            f"adapter_config.json: hidden_size {config.get('hidden_size')!r} is another base's; this one has "
            f"{hidden_size}"
        )
    settings = _canonical(base, config["config"]).to_dict()
    del settings["method"]
    sites = {_their_place(base, site): site for site in base.sublayers}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match["place"] not in sites:
            raise AdapterError(f"tensor {name!r} is no bottleneck of this base; nothing may be left unapplied")
        part = match["part"].partition(".")[0]
        found[f"{sites[match['place']].name}.{part}.{match['kind']}"] = tensor
    return {"peft_type": PEFT_TYPE, "hidden_size": hidden_size, **settings}, found


def _canonical(base: Base, theirs: Mapping[str, Any]) -> CanonicalAdaptersPEFTConfig:
    for key, value in theirs.items():
        if key in _REQUIRED and value != _REQUIRED[key]:
            raise AdapterError(f"adapter_config.json: {key} = {value!r} is not supported; only {_REQUIRED[key]!r} is")
        if key not in _REQUIRED and key not in _READ and key not in _HARMLESS and value:
            raise AdapterError(f"adapter_config.json: {key} = {value!r} is not supported (it would change the result)")
    factor, scaling = theirs.get("reduction_factor"), theirs.get("scaling", 1.0)
    if not _is_number(factor) or factor <= 0:
        raise AdapterError(f"adapter_config.json: reduction_factor must be one number above zero, not {factor!r}")
    if not _is_number(scaling):
        raise AdapterError(f"adapter_config.json: scaling must be a number, not {scaling!r}")
    activation = str(theirs.get("non_linearity")).lower()
    if activation not in _ACTIVATIONS:
        raise AdapterError(
            f"adapter_config.json: non_linearity {theirs.get('non_linearity')!r} is not supported; known: "
            f"{', '.join(_ACTIVATIONS)}"
        )
    parallel, summed = bool(theirs.get("is_parallel")), bool(theirs.get("original_ln_before"))
    if parallel and summed:
        raise AdapterError("adapter_config.json: is_parallel with original_ln_before is not supported")
    return CanonicalAdaptersPEFTConfig(
        adapter_dim=max(int(base.config.hidden_size / factor), 1),
        adapter_dropout=float(theirs.get("dropout") or 0.0),
        norm_position=None,
        activation=_ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        layer_selection=_layers(base, theirs.get("leave_out") or []),
        places=[place for key, place in _PLACES.items() if theirs.get(key)],
        bias=True,
        scale=float(scaling),
        source="residual" if parallel else "sum" if summed else "output",
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layers(base: Base, leave_out: Any) -> list[int] | None:
    """The layers that are kept, from 1; None: all. AdapterHub counts on from the encoder into the decoder."""
    if not isinstance(leave_out, list) or not all(type(number) is int for number in leave_out):
        raise AdapterError(f"adapter_config.json: leave_out must be a list of whole numbers, not {leave_out!r}")
    if not leave_out:
        return None
    if any(site.stack for site in base.sublayers):
        raise AdapterError("adapter_config.json: leave_out is not supported on an encoder-decoder")
    return [number + 1 for number in range(base.depth) if number not in leave_out]


def _their_place(base: Base, site: Site) -> str:
    if site.stack:
        kinds = [other.kind for other in base.sublayers if (other.stack, other.layer) == (site.stack, site.layer)]
        return f"{site.stack}.block.{site.layer}.layer.{kinds.index(site.kind)}"
    layers = "transformer.h" if base.config.family == "gpt2" else "model.layers"
    return f"{layers}.{site.layer}.{'attention' if site.kind == 'attention' else 'output'}_adapters"
