"""The tensors of a `.nemo` adapter whole again: shards joined, layers counted over all pipeline stages, one name each.

A name here is the layer as our sites write it, NeMo's module, NeMo's adapter and its parameter:
"layers.2.self_attention.lora_kqv_adapter.linear_in.weight", "encoder.layers.0.adapter_1.layer_norm.bias",
"ptuning_adapter.first.bias". Sources: NeMo 1.23 and 2.0, `megatron/adapters/parallel_adapters.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quiver_peft.adapters.formats.nemo.archive import CONFIG_MEMBER, Archive
from quiver_peft.base.base import Base
from quiver_peft.base.config import T5Config
from quiver_peft.base.sites import StackName
from quiver_peft.errors import AdapterError

_LAYER = re.compile(
    r"(?P<stack>.+)\.layers\.(?P<layer>\d+)\.(?P<module>(?:\w+\.)?)adapter_layer\.(?P<rest>.+)", re.ASCII
)
# Where the layers and P-Tuning's network lie: in Megatron-Core's models, and in NeMo's own before them.
_MCORE_STACKS: dict[bool, dict[str, StackName]] = {
    False: {"decoder": ""},
    True: {"encoder": "encoder", "decoder": "decoder"},
}
_LEGACY_STACKS: dict[bool, dict[str, StackName]] = {
    False: {"language_model.encoder": ""},
    True: {"enc_dec_model.encoder.model": "encoder", "enc_dec_model.decoder.model": "decoder"},
}
_MCORE_PROMPT = "embedding.adapter_layer."
_LEGACY_PROMPT = {False: "language_model.adapter_layer.", True: "adapter_layer."}

# Which dimension tensor parallelism cuts; None: every rank holds all of it. Column-parallel linears are cut by their
# outputs, row-parallel ones by their inputs.
_COLUMN_LORA = {"linear_in.weight": 0, "linear_out.weight": 0}
_ROW_LORA = {"linear_in.weight": 1, "linear_out.weight": 0}
_BOTTLENECK = {"linear_in.weight": 0, "linear_out.weight": 1, "layer_norm.weight": None, "layer_norm.bias": None}
_CUTS: dict[str, Mapping[str, int | None]] = {
    "lora_kqv_adapter": _COLUMN_LORA,
    "lora_unfused_kqv_adapter": _COLUMN_LORA,
    "lora_hto4h_adapter": _COLUMN_LORA,
    "lora_unfused_hto4h_adapter": _COLUMN_LORA,
    "lora_dense_attention_adapter": _ROW_LORA,
    "lora_4htoh_adapter": _ROW_LORA,
    "adapter_1": _BOTTLENECK,
    "adapter_2": _BOTTLENECK,
    "key_infused_adapter": {"scalers": 0},
    "value_infused_adapter": {"scalers": 0},
    "mlp_infused_adapter": {"scalers": 0},
    "ptuning_adapter": {
        **{"embedding.weight": None, "first.weight": 0, "first.bias": 0, "second.weight": 1, "second.bias": None}
    },
}


class NemoTensors:
    """The tensors by the names above, fp32, each to be taken once. is_mcore: of a model built of Megatron-Core."""

    def __init__(self, tensors: dict[str, Tensor], is_mcore: bool) -> None:
        self._left = tensors
        self.is_mcore = is_mcore

    def take(self, name: str, *shape: int) -> Tensor:
        """Raises AdapterError for a tensor that is missing or has another shape."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise AdapterError(f"tensor {name!r} is missing")
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"tensor {name!r} has shape {list(tensor.shape)}; this base and peft need {list(shape)}")
        return tensor

    def drop(self, part: str) -> None:
        """Leave out the tensors whose names hold this."""
        self._left = {name: tensor for name, tensor in self._left.items() if part not in name}

    def require_all_taken(self) -> None:
        """Raises AdapterError when something was left unapplied."""
        if self._left:
            name = next(iter(self._left))
            raise AdapterError(
                f"tensor {name!r} ({len(self._left)} in all) belongs to nothing that peft of {CONFIG_MEMBER} has; "
                "nothing may be left unapplied"
            )


def whole_tensors(archive: Archive, base: Base) -> NemoTensors:
    """Raises AdapterError."""
    found: dict[str, Tensor] = {}
    styles: set[bool] = set()
    for stage in range(archive.num_stages):
        shards = [_renamed(archive, base, shard, stage, styles) for shard in range(archive.num_shards)]
        for name in shards[0]:
            if any(set(shard) != set(shards[0]) for shard in shards):
                raise AdapterError(f"stage {stage}: its tensor-parallel ranks hold different tensors")
            if name in found:
                raise AdapterError(f"tensor {name!r} is there in two pipeline stages")
            found[name] = _joined(name, [shard[name].float() for shard in shards], base)
    if len(styles) > 1:
        raise AdapterError("its tensors' names are those of a Megatron-Core model and of an older one at once")
    return NemoTensors(found, styles == {True})


def _renamed(archive: Archive, base: Base, shard: int, stage: int, styles: set[bool]) -> dict[str, Tensor]:
    is_t5 = isinstance(base.config, T5Config)
    found: dict[str, Tensor] = {}
    for key, tensor in archive.ranks[shard, stage].items():
        # Mixed precision ("O2") wraps the model once more; NeMo leaves that out when it saves, mostly.
        name = re.sub(r"^(enc_dec_model|model)\.(module\.)?", "", key)
        match = _LAYER.fullmatch(name)
        if match is None:
            prompts = {_MCORE_PROMPT: True, _LEGACY_PROMPT[is_t5]: False}
            prefix = next((prefix for prefix in prompts if name.startswith(prefix)), None)
            if prefix is None:
                raise AdapterError(f"tensor {key!r} is no adapter's; nothing may be left unapplied")
            styles.add(prompts[prefix])
            found[name.removeprefix(prefix)] = tensor
            continue
        in_mcore, in_legacy = _MCORE_STACKS[is_t5].get(match["stack"]), _LEGACY_STACKS[is_t5].get(match["stack"])
        stack = in_legacy if in_mcore is None else in_mcore
        if stack is None:
            raise AdapterError(f"tensor {key!r} lies in {match['stack']}, which is no place in this kind of base")
        styles.add(in_mcore is not None)
        layer = _layer_number(archive, base, stack, stage, int(match["layer"]))
        if layer is None:
            raise AdapterError(f"tensor {key!r} lies in pipeline stage {stage}, which cannot hold it")
        found[f"{stack}{'.' if stack else ''}layers.{layer}.{match['module']}{match['rest']}"] = tensor
    return found


def _layer_number(archive: Archive, base: Base, stack: StackName, stage: int, local: int) -> int | None:
    """A layer's number in its whole stack (`ParallelTransformer`, its `offset`); None: there is no such layer."""
    num_layers, num_stages = base.config.num_layers, archive.num_stages
    if isinstance(base.config, T5Config):
        if stack == "encoder":
            num_layers = base.config.num_encoder_layers
        if num_stages > 1:
            split: Any = archive.config.get("pipeline_model_parallel_split_rank")
            if type(split) is not int or not 0 < split < num_stages:
                raise AdapterError(
                    f"{CONFIG_MEMBER}: pipeline_model_parallel_split_rank must lie within the {num_stages} stages, "
                    f"not be {split!r}"
                )
            stage, num_stages = (stage, split) if stack == "encoder" else (stage - split, num_stages - split)
    if num_layers % num_stages or not 0 <= stage < num_stages or local >= num_layers // num_stages:
        return None
    return stage * (num_layers // num_stages) + local


def _joined(name: str, shards: list[Tensor], base: Base) -> Tensor:
    adapter = next((adapter for adapter in _CUTS if f".{adapter}." in f".{name}"), "")
    cuts = {cut for parameter, cut in _CUTS.get(adapter, {}).items() if name.endswith(f".{parameter}")}
    if len(cuts) != 1:
        raise AdapterError(f"tensor {name!r} is of no adapter that is known; nothing may be left unapplied")
    cut = cuts.pop()
    if cut is None:
        if any(not torch.equal(shard, shards[0]) for shard in shards):
            raise AdapterError(f"tensor {name!r} must be the same in all tensor-parallel ranks")
        return shards[0]
    if any(shard.ndim <= cut or shard.shape != shards[0].shape for shard in shards):
        raise AdapterError(f"tensor {name!r}: its shards have the shapes {[list(shard.shape) for shard in shards]}")
    if adapter == "lora_hto4h_adapter" and name.endswith("linear_out.weight") and base.config.gated_mlp:
        # Each rank holds its part of the gate's rows and then its part of the other half's.
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[side] for side in (0, 1) for half in halves])
    return torch.cat(shards, dim=cut)
