"""How Megatron-Core's GPTModel and T5Model name and lay out what a base has, in their distributed checkpoints.

A tensor that every layer has is one tensor [layers, ...] there. Query, key and value of a group of heads follow one
another ([q .. q k v] for each key-value head), key and value of a cross-attention's head likewise; gate and up do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quiver_peft.base.base import Base
from quiver_peft.base.config import BaseConfig, T5Config

Layout = Literal["plain", "groups", "heads"]


@dataclass(frozen=True)
class Entry:
    """One parameter of a base. key: of theirs. layer: its place in their tensor; None: it is the whole tensor.

    pads: their tensor may hold more rows, of words nobody uses.
    """

    ours: str
    key: str
    layer: int | None = None
    num_layers: int = 0
    layout: Layout = "plain"
    pads: bool = False


# Within a layer. A norm belongs to the linear behind it, as Transformer Engine fuses them.
_LAYER_NAMES: dict[str, tuple[str, Layout]] = {
    "attention_norm.": ("self_attention.linear_qkv.layer_norm_", "plain"),
    "attention.qkv.": ("self_attention.linear_qkv.", "groups"),
    "attention.q_norm.": ("self_attention.q_layernorm.", "plain"),
    "attention.k_norm.": ("self_attention.k_layernorm.", "plain"),
    "attention.out.": ("self_attention.linear_proj.", "plain"),
    "cross_attention_norm.": ("pre_cross_attn_layernorm.", "plain"),
    "cross_attention.q.": ("cross_attention.linear_q.", "plain"),
    "cross_attention.kv.": ("cross_attention.linear_kv.", "heads"),
    "cross_attention.out.": ("cross_attention.linear_proj.", "plain"),
    "mlp_norm.": ("mlp.linear_fc1.layer_norm_", "plain"),
    "mlp.up.": ("mlp.linear_fc1.", "plain"),
    "mlp.down.": ("mlp.linear_fc2.", "plain"),
}


def entries(base: Base) -> Iterator[Entry]:
    """Every parameter of a base, a T5's head twice: its model asks for both names."""
    is_t5 = isinstance(base.config, T5Config)
    for name, _ in base.named_parameters():
        stack, dot, rest = name.rpartition("layers.")
        if dot:
            number, _, inner = rest.partition(".")
            part = inner[: inner.rindex(".") + 1]
            theirs, layout = _LAYER_NAMES[part]
            num_layers = _depth(base.config, stack)
            key = f"{stack or 'decoder.'}layers.{theirs}{inner.removeprefix(part)}"
            yield Entry(name, key, int(number), num_layers, layout)
        elif name == "embedding.weight":
            yield Entry(name, "embedding.word_embeddings.weight", pads=True)
        elif name == "position_embedding.weight":
            yield Entry(name, "embedding.position_embeddings.weight")
        elif name == "head.weight":
            for prefix in ("lm_head.", "") if is_t5 else ("",):
                yield Entry(name, f"{prefix}output_layer.weight", pads=True)
        elif name.endswith(".bias.weight"):
            yield Entry(name, f"{name.partition('.')[0]}_relative_pos_emb.relative_attention_bias.weight")
        else:  # the norm at the end of a stack
            stack, _, tensor = name.rpartition("norm.")
            yield Entry(name, f"{stack or 'decoder.'}final_layernorm.{tensor}")


def _depth(config: BaseConfig, stack: str) -> int:
    return config.num_encoder_layers if isinstance(config, T5Config) and stack == "encoder." else config.num_layers


def to_megatron(tensor: Tensor, layout: Layout, config: BaseConfig) -> Tensor:
    """Rows of ours in their order. tensor: [N, *]."""
    if layout == "plain":
        return tensor
    groups, size = config.num_kv_heads, config.head_dim
    queries = config.num_heads // groups if layout == "groups" else 0
    parts = tensor.split([groups * queries * size, groups * size, groups * size][-3 if queries else -2 :])
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def from_megatron(tensor: Tensor, layout: Layout, config: BaseConfig) -> Tensor:
    """The reverse."""
    if layout == "plain":
        return tensor
    groups, size = config.num_kv_heads, config.head_dim
    queries = config.num_heads // groups if layout == "groups" else 0
    parts = tensor.unflatten(0, (groups, -1)).split([queries * size, size, size][-3 if queries else -2 :], dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])
