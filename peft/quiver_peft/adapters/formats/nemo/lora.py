"""LoRA as NeMo 1.x saves it: one pair for a fused projection ("nemo"), or one for each of its parts ("canonical").

Shapes: R rank, K inputs, N outputs of a linear, G groups of heads (key-value heads), E head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quiver_peft.adapters.formats.nemo.config import Settings
from quiver_peft.adapters.formats.nemo.tensors import NemoTensors
from quiver_peft.adapters.methods.ia3 import IA3Weights
from quiver_peft.adapters.methods.lora import LoraPEFTConfig, LoraWeights
from quiver_peft.adapters.methods.targets import Target, module_targets, require_layers
from quiver_peft.base.base import Base
from quiver_peft.base.config import BaseConfig
from quiver_peft.base.sites import Linear
from quiver_peft.errors import AdapterError

# target_modules -> the linear's kind of site, NeMo's adapter on all of it, and its adapters on its parts.
_PLACES: dict[str, tuple[str, str, dict[str, str]]] = {
    "attention_qkv": (
        "attention.qkv",
        "self_attention.lora_kqv_adapter",
        {part: f"self_attention.lora_unfused_kqv_adapter.{part}_adapter" for part in ("q", "k", "v")},
    ),
    "attention_dense": ("attention.out", "self_attention.lora_dense_attention_adapter", {}),
    "mlp_fc1": (
        "mlp.up",
        "mlp.lora_hto4h_adapter",
        {part: f"mlp.lora_unfused_hto4h_adapter.{part}_adapter" for part in ("gate", "up")},
    ),
    "mlp_fc2": ("mlp.down", "mlp.lora_4htoh_adapter", {}),
}
_CROSS_DENSE = ("cross_attention.out", "inter_attention.lora_dense_attention_adapter", dict[str, str]())


def read_lora(
    base: Base,
    settings: Settings,
    tensors: NemoTensors,
    layers: Sequence[int] | None,
    ia3: Sequence[IA3Weights],
    *,
    on_cross_attention: bool,
) -> tuple[LoraPEFTConfig, tuple[LoraWeights, ...]]:
    """ia3: the scales of the same adapter. Raises AdapterError."""
    rank = settings.whole("adapter_dim")
    config = LoraPEFTConfig(
        adapter_dim=rank,
        alpha=settings.number("alpha", rank),
        adapter_dropout=settings.number("adapter_dropout", 0.0),
        dropout_position=settings.choice("dropout_position", "post", ("pre", "post")),
        target_modules=settings.places(),
        variant=settings.choice("variant", "nemo", ("nemo", "canonical")),
        layer_selection=layers,
    )
    settings.is_tied()  # tied factors are saved in every layer
    if layers is not None:
        require_layers(layers, base.depth)
    places = [_PLACES[place] for place in config.target_modules]
    if on_cross_attention and "attention_dense" in config.target_modules:
        places.append(_CROSS_DENSE)
    found: list[LoraWeights] = []
    for linear in base.linears():
        for kind, whole, parts in places:
            if linear.site.kind == kind and (layers is None or linear.site.layer + 1 in layers):
                names = parts if config.variant == "canonical" and parts else {"": whole}
                found += _read_linear(base, linear, names, config, tensors, ia3)
    return config, tuple(found)


def _read_linear(
    base: Base,
    linear: Linear,
    names: dict[str, str],
    config: LoraPEFTConfig,
    tensors: NemoTensors,
    ia3: Sequence[IA3Weights],
) -> list[LoraWeights]:
    """names: {part of the linear ("": all of it): NeMo's adapter on it}."""
    if not set(names) <= {"", *linear.parts}:
        raise AdapterError(f"variant 'canonical' halves {linear.site.name}, which is one projection in this base")
    alpha = config.alpha_of(config.adapter_dim, None)
    scale = alpha / config.adapter_dim
    prefix = linear.site.name.removesuffix(linear.site.kind)
    modules = {(target.site, target.part): target for target in module_targets(base).values()}
    found: list[LoraWeights] = []
    for part, name in names.items():
        target = Target.of(f"{linear.site.name}.{part}".removesuffix("."), linear, part)
        a = tensors.take(f"{prefix}{name}.linear_in.weight", config.adapter_dim, linear.in_features)
        b = tensors.take(f"{prefix}{name}.linear_out.weight", target.num_rows, config.adapter_dim)
        if linear.site.kind == "attention.qkv":
            b = _in_our_order(b, base.config) if not part else _after_scale(b, target, ia3)
        found.append(LoraWeights(modules.get((target.site, part), target), a, b, alpha, scale))
    is_one_module = (linear.site.name, "") in modules
    return [_stacked(found, modules[linear.site.name, ""])] if len(found) > 1 and is_one_module else found


def _in_our_order(b: Tensor, config: BaseConfig) -> Tensor:
    """[G · (queries of the group, key, value) · E, R] -> [all queries, all keys, all values, R]."""
    groups = b.unflatten(0, (config.num_kv_heads, -1, config.head_dim))
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


def _after_scale(b: Tensor, target: Target, ia3: Sequence[IA3Weights]) -> Tensor:
    """NeMo adds it to scaled keys and values, l k + B A x; ours are scaled last: l (k + (B / l) A x)."""
    for item in ia3:
        if (item.target.site, item.target.part) == (target.site, target.part):
            if not bool((item.scale != 0).all()):
                raise AdapterError(f"{target.name}: a LoRA beside an IA3 scale of zero is not supported")
            return b / item.scale[:, None]
    return b


def _stacked(parts: Sequence[LoraWeights], whole: Target) -> LoraWeights:
    """Several pairs on one module of the checkpoint as one: their ranks side by side, each with rows of its own."""
    a, b = torch.cat([item.a for item in parts]), torch.block_diag(*(item.b for item in parts))
    return LoraWeights(whole, a, b, parts[0].alpha * len(parts), parts[0].scale)
