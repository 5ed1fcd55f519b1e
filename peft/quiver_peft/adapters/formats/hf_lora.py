"""LoRA in Hugging Face PEFT's form, read strictly: `adapter_config.json` and tensor names.

Format: peft 0.21 `tuners/lora/config.py`, `utils/save_and_load.py`. LoRA tensors are never transposed, not even for
GPT-2's Conv1D.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quiver_peft.adapters.formats.hf_common import PREFIX, check_task_type
from quiver_peft.adapters.methods.lora import LoraPEFTConfig, LoraWeights, lora_scale
from quiver_peft.adapters.methods.targets import Target, matches_module, module_targets, require_expression
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError

_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB]\.weight|magnitude_vector)")

USED_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules"),
    *("use_dora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_dropout"),
}
# Fields that say nothing about the mathematics of inference.
HARMLESS_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
    *("eva_config", "lora_ga_config", "init_lora_weights", "task_type", "bias"),
}
# Initialisations that leave the base's own weights alone; after the others (pissa, olora, loftq, corda, lora_ga) the
# adapter without its changed base is not the adapter.
_BASE_KEEPING_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_hf_lora(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[LoraPEFTConfig, tuple[LoraWeights, ...]]:
    """Validated weights for `base`.

    Raises AdapterError for a field we cannot honour or a tensor missing, left over or misshapen; BaseMismatchError.
    """
    check_task_type(base, config)
    _refuse_unknown_mathematics(config)
    _check_values(config)
    modules = module_targets(base)
    expected = [module for module in modules if _is_target(config, module)]
    if not expected:
        # Names that are there but unknown are another architecture's.
        raise (BaseMismatchError if config.get("target_modules") else AdapterError)(
            f"adapter_config.json: target_modules {config.get('target_modules')!r} match no linear of this base "
            f"({base.config.family}: {', '.join(sorted({m.rpartition('.')[2] for m in modules}))})"
        )
    factors = _factors_by_module(tensors)
    for module in factors:
        if module not in expected:
            reason = "is not among target_modules" if module in modules else "does not exist in this base"
            raise AdapterError(f"adapter_model.safetensors: module {module!r} {reason}; nothing may be left unapplied")
    weights: list[LoraWeights] = []
    for module in expected:
        _require_factors(module, set(factors.get(module, ())), bool(config.get("use_dora")))
        weights.append(_weights_of(modules[module], factors[module], config))
    return _our_config(config), fuse_shared_a(weights)


def _refuse_unknown_mathematics(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in USED_FIELDS or key in HARMLESS_FIELDS or not value:
            continue
        raise AdapterError(f"adapter_config.json: {key} = {value!r} is not supported (it would change the result)")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter_config.json: bias = {config['bias']!r} is not supported; only 'none' is")
    init = config.get("init_lora_weights")
    if init not in _BASE_KEEPING_INITS:
        raise AdapterError(
            f"adapter_config.json: init_lora_weights = {init!r} changes the base's own weights; "
            "convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )


def _check_values(config: Mapping[str, Any]) -> None:
    """Types and ranges of the fields we use; names of modules are checked where they are matched."""
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout")
    if not _is_positive(rank) or not isinstance(rank, int):
        raise AdapterError(f"adapter_config.json: r must be a positive whole number, not {rank!r}")
    if not _is_positive(alpha):
        raise AdapterError(f"adapter_config.json: lora_alpha must be a positive number, not {alpha!r}")
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise AdapterError(f"adapter_config.json: lora_dropout must be a number in [0, 1), not {dropout!r}")
    for key in ("use_rslora", "use_dora"):
        if config.get(key) not in (None, True, False):
            raise AdapterError(f"adapter_config.json: {key} must be true or false, not {config[key]!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_positive(value) for value in patterns.values()):
            raise AdapterError(
                f"adapter_config.json: {key} must map module names to positive numbers, not {patterns!r}"
            )
        for pattern in patterns:
            require_expression(f"adapter_config.json: {key}", pattern)


def _is_positive(value: object) -> bool:
    """A number above zero, and finite: JSON as Python reads it knows NaN and Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < sys.float_info.max


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    excluded, names = config.get("exclude_modules"), config.get("target_modules") or []
    try:
        if excluded and matches_module(excluded, module):
            return False
        if not matches_module(names, module):
            return False
        layers = config.get("layers_to_transform")
        # A module named in full is a target whatever layers_to_transform says.
        if isinstance(names, str) or module in names or layers is None or layers == []:
            return True
        patterns = config.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    except (re.error, TypeError, AttributeError) as error:
        raise AdapterError(f"adapter_config.json: target_modules or layers_pattern are malformed: {error}") from None
    return False


def _factors_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"adapter_model.safetensors: tensor {name!r} is not a lora_A or lora_B; nothing may be left unapplied"
            )
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    return factors


def _require_factors(module: str, found: set[str], use_dora: bool) -> None:
    if not {"A.weight", "B.weight"} <= found:
        raise AdapterError(f"adapter_model.safetensors: lora_A and lora_B of {module!r} must both be there")
    if use_dora and "magnitude_vector" not in found:
        raise AdapterError(
            f"adapter_model.safetensors: lora_magnitude_vector of {module!r} is missing; use_dora is set in "
            "adapter_config.json"
        )
    if "magnitude_vector" in found and not use_dora:
        raise AdapterError(
            f"adapter_model.safetensors: lora_magnitude_vector of {module!r} is there, but use_dora is not set; "
            "nothing may be left unapplied"
        )


def _weights_of(target: Target, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraWeights:
    a, b, magnitude = factors["A.weight"], factors["B.weight"], factors.get("magnitude_vector")
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    rank_key, alpha_key = target.match(ranks), target.match(alphas)
    rank = int(config["r"] if rank_key is None else ranks[rank_key])
    alpha = float(config["lora_alpha"] if alpha_key is None else alphas[alpha_key])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"adapter_model.safetensors: {target.name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} "
            f"do not fit rank {rank} of adapter_config.json"
        )
    if (a.shape[1], b.shape[0]) != (target.in_features, target.num_rows):
        raise BaseMismatchError(
            f"adapter_model.safetensors: {target.name}: the adapter is for a linear of {a.shape[1]} inputs and "
            f"{b.shape[0]} outputs, this base has {target.in_features} and {target.num_rows}"
        )
    scale = lora_scale(alpha, rank, bool(config.get("use_rslora")))
    if magnitude is not None:
        if list(magnitude.shape) != [target.num_rows]:
            raise AdapterError(
                f"adapter_model.safetensors: lora_magnitude_vector of {target.name!r} has shape "
                f"{list(magnitude.shape)}, not {[target.num_rows]}"
            )
        magnitude = magnitude.float()
    return LoraWeights(target, a.float().contiguous(), b.float().contiguous(), alpha, scale, magnitude)


def _our_config(config: Mapping[str, Any]) -> LoraPEFTConfig:
    names = config["target_modules"]
    return LoraPEFTConfig(
        adapter_dim=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        adapter_dropout=float(config.get("lora_dropout") or 0.0),
        dropout_position="pre",
        target_modules=names if isinstance(names, str) else tuple(sorted(names)),
        variant="canonical",
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
    )


def fuse_shared_a(weights: Sequence[LoraWeights]) -> tuple[LoraWeights, ...]:
    """Modules of one fused linear that share one A become one target again: NeMo's variant, cheaper to serve."""
    by_site: dict[str, list[LoraWeights]] = {}
    for item in weights:
        by_site.setdefault(item.target.site, []).append(item)
    result: list[LoraWeights] = []
    for site, items in by_site.items():
        first = items[0]
        adjacent = all(a.target.rows[1] == b.target.rows[0] for a, b in pairwise(items))
        shared = all(item.scale == first.scale and torch.equal(item.a, first.a) for item in items)
        if len(items) > 1 and adjacent and shared:
            rows = (first.target.rows[0], items[-1].target.rows[1])
            target = Target(site, site, "", rows, first.target.in_features)
            lengths = [item.magnitude for item in items if item.magnitude is not None]
            b, magnitude = torch.cat([item.b for item in items]), torch.cat(lengths) if lengths else None
            items = [LoraWeights(target, first.a, b, first.alpha, first.scale, magnitude)]
        result += items
    return tuple(result)
