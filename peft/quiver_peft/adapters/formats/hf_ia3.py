"""IA3 in Hugging Face PEFT's form, read strictly and written as PEFT writes it.

Format: peft 0.21 `tuners/ia3`. A scale on the output has shape [N, 1], one on the input [1, K].
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quiver_peft.adapters.formats.hf_common import PREFIX, check_task_type, shortest_names
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig, IA3Weights, refuse_part_inputs
from quiver_peft.adapters.methods.targets import Target, matches_module, module_targets
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError

_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.ia3_l")
_USED_FIELDS = {"target_modules", "exclude_modules", "feedforward_modules"}
_HARMLESS_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("fan_in_fan_out", "init_ia3_weights", "task_type"),
}


def read_hf_ia3(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[IA3PEFTConfig, tuple[IA3Weights, ...]]:
    """Validated weights for `base`.

    Raises AdapterError for a field we cannot honour or a tensor missing, left over or misshapen; BaseMismatchError.
    """
    check_task_type(base, config)
    _refuse_unknown_mathematics(config)
    names, feedforward = config.get("target_modules"), config.get("feedforward_modules") or []
    modules = module_targets(base)
    try:
        excluded = config.get("exclude_modules")
        expected = {
            module: bool(feedforward) and matches_module(feedforward, module)
            for module in modules
            if matches_module(names or [], module) and not (excluded and matches_module(excluded, module))
        }
    except (re.error, TypeError, AttributeError) as error:
        raise AdapterError(
            f"adapter_config.json: target_modules or feedforward_modules are malformed: {error}"
        ) from None
    if not expected:
        raise (BaseMismatchError if names else AdapterError)(
            f"adapter_config.json: target_modules {names!r} match no linear of this base "
            f"({base.config.family}: {', '.join(sorted({m.rpartition('.')[2] for m in modules}))})"
        )
    refuse_part_inputs([(modules[module], on_input) for module, on_input in expected.items()])
    scales = _scales_by_module(tensors, expected, modules)
    weights = [
        IA3Weights(modules[module], _vector(modules[module], scales[module], on_input), on_input)
        for module, on_input in expected.items()
    ]
    found = IA3PEFTConfig(_as_config(names), _as_config(feedforward))
    return found, tuple(weights)


def _refuse_unknown_mathematics(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _USED_FIELDS and key not in _HARMLESS_FIELDS and value:
            raise AdapterError(f"adapter_config.json: {key} = {value!r} is not supported (it would change the result)")


def _as_config(names: Any) -> Sequence[str] | str:
    return names if isinstance(names, str) else tuple(sorted(names))


def _scales_by_module(
    tensors: Mapping[str, Tensor], expected: Mapping[str, bool], modules: Mapping[str, Target]
) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"adapter_model.safetensors: tensor {name!r} is not an ia3_l; nothing may be left unapplied"
            )
        module = match["module"]
        if module not in expected:
            reason = "is not among target_modules" if module in modules else "does not exist in this base"
            raise AdapterError(f"adapter_model.safetensors: module {module!r} {reason}; nothing may be left unapplied")
        scales[module] = tensor
    for module in expected:
        if module not in scales:
            raise AdapterError(f"adapter_model.safetensors: ia3_l of {module!r} is missing")
    return scales


def _vector(target: Target, scale: Tensor, on_input: bool) -> Tensor:
    wanted = [1, target.in_features] if on_input else [target.num_rows, 1]
    if list(scale.shape) == wanted:
        return scale.float().reshape(-1)
    kind = "feedforward " if on_input else ""
    other_size = scale.ndim == 2 and (scale.shape[0] == 1) == on_input and 1 in scale.shape
    raise (BaseMismatchError if other_size else AdapterError)(
        f"adapter_model.safetensors: ia3_l of the {kind}module {target.name!r} has shape {list(scale.shape)}; "
        f"this base has {wanted}"
    )


def write_hf_ia3(
    base: Base, config: IA3PEFTConfig, weights: Sequence[IA3Weights], base_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and its tensors. A module of which only some rows are scaled gets ones for the others."""
    modules = module_targets(base)
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    for item in weights:
        start, end = item.target.rows
        for module, target in modules.items():
            overlap = max(start, target.rows[0]), min(end, target.rows[1])
            if target.site != item.target.site or overlap[0] >= overlap[1]:
                continue
            key = f"{PREFIX}{module}.ia3_l"
            if item.on_input:
                tensors[key] = item.scale.clone().view(1, -1)
                inputs.append(module)
            else:
                whole = tensors.setdefault(key, torch.ones(target.num_rows, 1))
                first = target.rows[0]
                whole[overlap[0] - first : overlap[1] - first, 0] = item.scale[overlap[0] - start : overlap[1] - start]
    chosen = [key.removeprefix(PREFIX).removesuffix(".ia3_l") for key in tensors]
    names = shortest_names(chosen, list(modules))
    return {
        "peft_type": "IA3",
        "task_type": base.hf_task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "fan_in_fan_out": base.config.family == "gpt2",
        "target_modules": names,
        # Among target_modules letter by letter, as PEFT wants it.
        "feedforward_modules": [name for name in names if any(matches_module([name], module) for module in inputs)],
    }, tensors
