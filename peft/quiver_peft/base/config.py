"""Base configurations: flat, frozen dataclasses with one vocabulary for all checkpoint families."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quiver_peft.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and the scaling kinds that current models use.

    kind: "default", "linear" (positions divided by `factor`), "dynamic" (unscaled: it only changes beyond the
    trained length, which we do not serve), "llama3", "yarn". Formulas: transformers `modeling_rope_utils.py`.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Shapes and choices that every base has. Sizes in elements.

    num_layers: of the stack that generates. norm: "layer_1p" is a LayerNorm whose weight is stored less one.
    qk_norm: an RMSNorm on each head's query and key.
    max_positions: tokens that a sequence may have; None: positions are relative, and only memory is a limit.
    windows: how many tokens each layer looks back, itself included (None: all); () when no layer has a limit.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int | None
    norm: Literal["rms", "layer", "layer_1p"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...] = field(default=())
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class GPTConfig(BaseConfig):
    """A decoder-only base. rope: None means learned positions."""

    max_positions: int
    rope: RopeConfig | None
    bos_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class T5Config(BaseConfig):
    """An encoder-decoder base.

    num_buckets, max_distance: of the relative positions; farther tokens share one bucket.
    scaled_head: hidden states are multiplied by hidden_size ** -0.5 before the head (T5 1.0).
    start_token_id: what every answer begins with, inside.
    """

    num_encoder_layers: int
    num_buckets: int
    max_distance: int
    scaled_head: bool
    start_token_id: int


def token_ids(value: object) -> tuple[int, ...]:
    """An id, a list of ids or null, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list):
        return tuple(int(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    raise CheckpointError(f"config.json: a token id must be a number or a list of numbers, not {value!r}")


def read_rope(hf: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rotary embedding of a config.json: old keys (`rope_theta`, `rope_scaling`) or new (`rope_parameters`)."""
    given: dict[str, Any] = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta", hf.get("rope_theta", 10000.0)))
    dim = int(head_dim * float(given.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))))
    max_positions = int(hf["max_position_embeddings"])
    factor = float(given.get("factor") or 1.0)
    original = int(given.get("original_max_position_embeddings") or max_positions)
    if kind in ("default", "linear", "dynamic"):
        return RopeConfig(theta, dim, kind, factor=factor)
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeConfig(theta, dim, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        if not given.get("factor"):
            factor = max_positions / original
        return RopeConfig(
            theta,
            dim,
            kind,
            factor,
            original,
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            truncate=bool(given.get("truncate", True)),
            attention_factor=_yarn_attention_factor(given, factor),
        )
    raise CheckpointError(
        f"config.json: rope_type {kind!r} is not supported; known: default, linear, dynamic, llama3, yarn"
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature on the attention logits (Peng et al. 2023, eq. 22; DeepSeek's mscale variant)."""

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    numerator, denominator = given.get("mscale"), given.get("mscale_all_dim")
    if numerator and denominator:
        return mscale(factor, float(numerator)) / mscale(factor, float(denominator))
    return mscale(factor)
