"""Layers of a base: norms, rotary positions, attention and MLP sub-layers.

Legend of shapes in this package: T tokens, B sequences, S tokens of a sequence, D hidden size, K inputs and N outputs
of a linear, H query heads, G key-value heads, E head size, F feed-forward size, V vocabulary, L layers.
`*` stands for any leading dimensions: [T] while serving (rows packed, no padding), [B, S] while training.
"""

import math

import torch
from torch import Tensor, nn

from quiver_peft.base.attention import Attend
from quiver_peft.base.config import BaseConfig, RopeConfig
from quiver_peft.base.sites import Linear, Seam, Site, StackName
from quiver_peft.kernels.elementwise import (
    Activation,
    activate,
    apply_rope,
    embedding,
    layer_norm,
    rms_norm,
    rope_cos_sin,
)
from quiver_peft.kernels.packed_linear import PackedWeight, packed_rows


class Embedding(nn.Embedding):
    """Embedding look-up by the kernels.

    compute_dtype: of the rows returned; None: the weight's own. packed: the head's packed weight where the two are
    tied; the plain weight is then empty.
    """

    compute_dtype: torch.dtype | None = None
    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[*] int64 -> [*, D]."""
        if self.packed is not None:
            return packed_rows(self.packed, input)
        return embedding(self.weight, input, self.compute_dtype or self.weight.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, D] -> [*, D]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight + bias (Ba et al. 2016). weight_offset: what the weight is stored less."""

    def __init__(self, hidden_size: int, eps: float, weight_offset: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, D] -> [*, D]."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.weight_offset)


def make_norm(config: BaseConfig) -> nn.Module:
    """The norm layer of a configuration."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    # Nemotron stores the weight less one.
    return LayerNorm(config.hidden_size, config.norm_eps, 1.0 if config.norm == "layer_1p" else 0.0)


def rope_frequencies(rope: RopeConfig) -> Tensor:
    """Inverse frequencies, [rope.dim / 2] fp32. Formulas: transformers `modeling_rope_utils.py`."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, inverse)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, inverse)
    return inverse


def _llama3_frequencies(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Long wave lengths are stretched by `factor`, short ones kept, those between blended."""
    wave_lengths = 2 * math.pi / inverse
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_stretched = rope.original_max_positions / rope.low_freq_factor
    blend = (rope.original_max_positions / wave_lengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wave_lengths > shortest_stretched, inverse / rope.factor, blended)
    return torch.where(wave_lengths < longest_kept, inverse, scaled)


def _yarn_frequencies(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Interpolates slow dimensions, keeps fast ones, ramps between (Peng et al. 2023, section 3.2)."""

    def dimension_of(num_rotations: float) -> float:
        return (rope.dim * math.log(rope.original_max_positions / (num_rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


class Rotary(nn.Module):
    """Cosines and sines of a model's rotary positions, computed once for each forward."""

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        self.attention_factor = rope.attention_factor
        # Kept out of the state dict: it follows from the configuration. Kept in fp32 whatever the model's dtype.
        self.frequencies = rope_frequencies(rope)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [*] int64 -> cos, sin: [*, 1, dim], to be broadcast over heads."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        cos, sin = rope_cos_sin(positions, self.frequencies, self.attention_factor)
        return cos.to(dtype), sin.to(dtype)


class Attention(nn.Module):
    """Self-attention with fused query, key and value; keys and values go through `attend`, which may cache them."""

    def __init__(self, config: BaseConfig, layer: int, stack: StackName = "") -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.site = Site.in_layer(layer, "attention", stack)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            Site.in_layer(layer, "attention.qkv", stack),
            config.hidden_size,
            {"q": q_size, "k": kv_size, "v": kv_size},
            config.qkv_bias,
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        out_site = Site.in_layer(layer, "attention.out", stack)
        self.out = Linear(out_site, q_size, {"out": config.hidden_size}, config.out_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend, seam: Seam) -> Tensor:
        """x: [*, D] -> [*, D]."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(seam.linear(self.qkv, x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        k, v = seam.key_values(self.site, k, v)
        return seam.linear(self.out, attend(self.layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    """Feed-forward sub-layer; with `gated_mlp` act(gate) · up (Shazeer 2020)."""

    def __init__(self, config: BaseConfig, layer: int, stack: StackName = "") -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.gated = config.gated_mlp
        self.site = Site.in_layer(layer, "mlp", stack)
        parts = {"gate": config.ffn_size} if config.gated_mlp else {}
        self.up = Linear(
            Site.in_layer(layer, "mlp.up", stack),
            config.hidden_size,
            {**parts, "up": config.ffn_size},
            config.mlp_bias,
        )
        self.down = Linear(
            Site.in_layer(layer, "mlp.down", stack), config.ffn_size, {"down": config.hidden_size}, config.mlp_bias
        )

    def forward(self, x: Tensor, seam: Seam) -> Tensor:
        """x: [*, D] -> [*, D]."""
        return seam.linear(self.down, activate(self.activation, seam.linear(self.up, x), gated=self.gated))
