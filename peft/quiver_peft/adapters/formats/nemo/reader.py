"""NeMo 1.x's adapters (`.nemo`) in our own terms: LoRA, IA3, canonical adapters, P-Tuning and their combinations.

Mathematics: NeMo 1.23 and 2.0, `megatron/adapters/{parallel_adapters,mcore_mixins}.py`, and in models older than
Megatron-Core `megatron/{attention,mlp,transformer,token_level_encoder_decoder}.py`. What differs from Hugging Face:

- A fused projection holds, for each group of heads, its queries, then its key, then its value; ours all queries first.
- A canonical adapter reads a sub-layer's output before the bias of its last linear is added.
- IA3 comes before a LoRA on query, key and value apart, and after one on all together.
- A virtual token has no learned position of its own: what a base adds is subtracted from the table.
- NeMo's older T5 also puts IA3, and a LoRA on `attention_dense`, on cross-attention.

Shapes: R rank, K inputs, G groups (key-value heads), E head size, D hidden size, n virtual tokens.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from quiver_peft.adapters.formats.nemo.archive import read_archive
from quiver_peft.adapters.formats.nemo.config import Settings, check_base, read_settings
from quiver_peft.adapters.formats.nemo.lora import read_lora
from quiver_peft.adapters.formats.nemo.tensors import NemoTensors, whole_tensors
from quiver_peft.adapters.formats.quiver_bottleneck import are_tied, bottleneck_weights
from quiver_peft.adapters.methods.bottleneck import (
    BottleneckWeights,
    CanonicalAdaptersPEFTConfig,
    bottleneck_shapes,
    bottleneck_sites,
)
from quiver_peft.adapters.methods.configs import METHOD_ORDER, method_name
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig, IA3Weights, scaled_targets
from quiver_peft.adapters.methods.prompt import PromptWeights, PtuningPEFTConfig
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.adapters.methods.virtual_tokens import require_room
from quiver_peft.adapters.weights import AdapterWeights, fold_scales
from quiver_peft.base.base import Base
from quiver_peft.base.config import T5Config
from quiver_peft.base.gpt import GPTBase
from quiver_peft.errors import AdapterError

_BOTTLENECKS = {"attention": "adapter_1", "mlp": "adapter_2"}
_BOTTLENECK_TENSORS = {
    "down.weight": "linear_in.weight",
    "up.weight": "linear_out.weight",
    "norm.weight": "layer_norm.weight",
    "norm.bias": "layer_norm.bias",
}
# (kind of site, part of its linear) -> NeMo's module and adapter.
_SCALES = {
    ("attention.qkv", "k"): "self_attention.key_infused_adapter",
    ("attention.qkv", "v"): "self_attention.value_infused_adapter",
    ("cross_attention.kv", "k"): "inter_attention.key_infused_adapter",
    ("cross_attention.kv", "v"): "inter_attention.value_infused_adapter",
    ("mlp.down", ""): "mlp.mlp_infused_adapter",
}


def read_nemo(path: Path, base: Base) -> AdapterWeights:
    """Validated weights for `base`. Raises AdapterError; BaseMismatchError when they belong to another."""
    archive = read_archive(path)
    try:
        settings = read_settings(archive.config)
        check_base(base, archive.config)
        weights = _translate(base, settings, whole_tensors(archive, base))
    except AdapterError as error:
        raise type(error)(f"{path}: {error}") from None
    with path.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(weights, revision=revision)


def _translate(base: Base, schemes: dict[str, Settings], tensors: NemoTensors) -> AdapterWeights:
    weights = AdapterWeights("", ())
    is_old_t5 = isinstance(base.config, T5Config) and not tensors.is_mcore
    # Sorted: IA3 before LoRA, whose factors may be read against its scales.
    for scheme, settings in sorted(schemes.items()):
        layers = None if is_old_t5 or scheme == "ptuning" else settings.layers()  # NeMo warns, and adapts all
        if scheme == "ia3":
            config, ia3 = _read_ia3(base, tensors, layers, on_cross_attention=is_old_t5)
            weights = replace(weights, configs=(*weights.configs, config), ia3=ia3)
        elif scheme == "lora":
            config, lora = read_lora(base, settings, tensors, layers, weights.ia3, on_cross_attention=is_old_t5)
            weights = replace(weights, configs=(*weights.configs, config), lora=lora)
        elif scheme == "adapter":
            config, bottlenecks = _read_bottlenecks(base, settings, tensors, layers)
            weights = replace(weights, configs=(*weights.configs, config), bottlenecks=bottlenecks)
        else:
            config, prompt = _read_prompt(base, settings, tensors)
            weights = replace(weights, configs=(*weights.configs, config), prompt=prompt)
    if is_old_t5:
        # NeMo puts it there, cross-attention being an attention too, and never asks it.
        tensors.drop(".inter_attention.lora_kqv_adapter.")
    tensors.require_all_taken()
    configs = sorted(weights.configs, key=lambda config: METHOD_ORDER.index(method_name(config)))
    return replace(weights, configs=tuple(configs), scales=fold_scales(base, weights.lora, weights.ia3))


def _read_ia3(
    base: Base, tensors: NemoTensors, layers: list[int] | None, *, on_cross_attention: bool
) -> tuple[IA3PEFTConfig, tuple[IA3Weights, ...]]:
    """Keys, values and what enters the MLP's last linear."""
    config = IA3PEFTConfig(layer_selection=layers)
    found: list[IA3Weights] = []
    for target, on_input in scaled_targets(base, config):
        layer, kind = re.fullmatch(r"(.*layers\.\d+)\.(.+)", target.site).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if kind == "cross_attention.kv" and not on_cross_attention:
            continue
        size = target.in_features if on_input else target.num_rows
        found.append(IA3Weights(target, tensors.take(f"{layer}.{_SCALES[kind, target.part]}.scalers", size), on_input))
    if not on_cross_attention and isinstance(base.config, T5Config):
        inputs = [item.target.name for item in found if item.on_input]
        config = IA3PEFTConfig([item.target.name for item in found], inputs)
    return config, tuple(found)


def _read_bottlenecks(
    base: Base, settings: Settings, tensors: NemoTensors, layers: list[int] | None
) -> tuple[CanonicalAdaptersPEFTConfig, tuple[BottleneckWeights, ...]]:
    settings.choice("norm_type", "mixedfusedlayernorm", ("mixedfusedlayernorm", "layernorm"))  # one formula, one eps
    config = CanonicalAdaptersPEFTConfig(
        adapter_dim=settings.whole("adapter_dim"),
        adapter_dropout=settings.number("adapter_dropout", 0.0),
        norm_position=settings.choice("norm_position", "pre", ("pre", "post", None)),
        layer_selection=layers,
        source="output_before_bias",
    )
    found: dict[str, Tensor] = {}
    for site in bottleneck_sites(base, config):
        at = f"{site.name.removesuffix(site.kind)}{_BOTTLENECKS[site.kind]}"
        for name, shape in bottleneck_shapes(config, base.config.hidden_size).items():
            found[f"{site.name}.{name}"] = tensors.take(f"{at}.{_BOTTLENECK_TENSORS[name]}", *shape)
    # Tied ones are saved in every layer; those of different pipeline stages were never tied.
    if settings.is_tied() and are_tied(found):
        config = replace(config, weight_tying=True)
    return config, tuple(bottleneck_weights(base, config, found))


def _read_prompt(base: Base, settings: Settings, tensors: NemoTensors) -> tuple[PtuningPEFTConfig, PromptWeights]:
    """What the network makes, whatever table lies beside it."""
    if isinstance(base.config, T5Config) and tensors.is_mcore:
        raise AdapterError("P-Tuning on a Megatron-Core T5 also replaced the decoder's first tokens: not supported")
    config = PtuningPEFTConfig(
        settings.whole("virtual_tokens"),
        settings.whole("bottleneck_dim"),
        settings.whole("embedding_dim"),
        settings.number("init_std", 0.023),
    )
    n, inputs, inner, hidden = (
        config.virtual_tokens,
        config.embedding_dim,
        config.bottleneck_dim,
        base.config.hidden_size,
    )
    require_room(base, n)

    def take(name: str, *shape: int) -> Tensor:
        return tensors.take(f"ptuning_adapter.{name}", *shape)

    z = F.linear(take("embedding.weight", n, inputs), take("first.weight", inner, inputs), take("first.bias", inner))
    z = F.gelu(z, approximate="tanh")
    table = F.linear(z, take("second.weight", hidden, inner), take("second.bias", hidden))
    if isinstance(base, GPTBase) and base.position_embedding is not None:
        table = table - to_host_fp32(base.position_embedding.weight[:n])
    return config, PromptWeights(table)
