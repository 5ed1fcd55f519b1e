"""LoRA (Hu et al. 2021): y = x Wᵀ + s (x Aᵀ) Bᵀ, with A [R, K], B [N, R], s = alpha / R (rsLoRA: alpha / √R).

Shapes: * any leading dimensions, K inputs and N outputs of the adapted rows of a linear, R rank.

    x [*, K] ──┬── W ─────────────── y [*, N]
               └── A ── [*, R] ── B ──┘ (+, times s)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.adapters.methods.dora import magnitude_ratio, weight_norms
from quiver_peft.adapters.methods.method import Method
from quiver_peft.adapters.methods.targets import Target, require_matches, resolve_targets, select_layers
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear, Site
from quiver_peft.errors import AdapterError


@dataclass(frozen=True)
class LoraPEFTConfig:
    """What to train. Names and meaning follow NeMo 1.x `LoraPEFTConfig`; patterns follow Hugging Face PEFT.

    adapter_dim: the rank R. alpha: scale numerator, None means adapter_dim (scale 1).
    target_modules: NeMo's places (attention_qkv, attention_dense, mlp_fc1, mlp_fc2, attention, mlp, all) or checkpoint
        module names ("q_proj", "model.layers.0.mlp.down_proj"); a single string is a regular expression on these.
    variant: "nemo": one A for a fused linear (q, k, v share it); "canonical": an A for each of its parts.
    dropout_position: "pre": on x (as in Hugging Face); "post": on the product B A x (NeMo's default).
    use_dora: train the length of each row of W + s B A apart from its direction; see dora.py.
    layer_selection: numbers of layers, from 1; None means all.
    rank_pattern, alpha_pattern: {regular expression on the end of a module name: its own rank or alpha}.
    """

    adapter_dim: int = 32
    alpha: float | None = None
    adapter_dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "post"
    target_modules: Sequence[str] | str = ("attention_qkv",)
    variant: Literal["nemo", "canonical"] = "nemo"
    column_init_method: Literal["xavier", "normal", "kaiming"] = "xavier"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    layer_selection: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.adapter_dim < 1:
            raise AdapterError(f"LoRA: adapter_dim must be at least 1, not {self.adapter_dim}")
        if self.alpha is not None and not self.alpha > 0:  # "not >" refuses NaN as well
            raise AdapterError(f"LoRA: alpha must be above 0, not {self.alpha}")
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise AdapterError(f"LoRA: rank_pattern: the rank of {key!r} must be at least 1, not {rank}")
        for key, alpha in self.alpha_pattern.items():
            if not alpha > 0:
                raise AdapterError(f"LoRA: alpha_pattern: the alpha of {key!r} must be above 0, not {alpha}")
        if not 0.0 <= self.adapter_dropout < 1.0:
            raise AdapterError(f"LoRA: adapter_dropout must be in [0, 1), not {self.adapter_dropout}")
        for name, value, known in (
            ("dropout_position", self.dropout_position, ("pre", "post")),
            ("variant", self.variant, ("nemo", "canonical")),
            ("column_init_method", self.column_init_method, ("xavier", "normal", "kaiming")),
        ):
            if value not in known:
                raise AdapterError(f"LoRA: {name} must be one of {', '.join(known)}, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "lora", **asdict(self)}

    def alpha_of(self, rank: int, pattern_key: str | None) -> float:
        """The alpha of a target that matched `pattern_key` of alpha_pattern."""
        if pattern_key is not None:
            return self.alpha_pattern[pattern_key]
        # HF keeps the global alpha for a target whose rank is special; NeMo's "alpha = dim" is a global number too.
        return float(self.adapter_dim) if self.alpha is None else self.alpha


@dataclass(frozen=True)
class LoraWeights:
    """LoRA of one target, on the host. a: [R, K], b: [N, R], fp32; alpha as configured, `scale` = s.

    magnitude: [N], DoRA's lengths of rows; None for plain LoRA.
    """

    target: Target
    a: Tensor
    b: Tensor
    alpha: float
    scale: float
    magnitude: Tensor | None = None


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """s of the formula; rsLoRA: Kalajdzievski 2023."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


class LoraPair(nn.Module):
    """A and B of one target. a: [R, K], b: [N, R]. magnitude: [N] or None, DoRA's."""

    def __init__(self, target: Target, rank: int, alpha: float, scale: float, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.target = target
        self.alpha = alpha
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, target.in_features))
        self.b = nn.Parameter(torch.zeros(target.num_rows, rank))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.clone())


class LoraModule(Method):
    """Trainable LoRA of one adapter, all targets. B starts at zero: a new adapter equals the base bit for bit."""

    name = "lora"

    def __init__(self, config: LoraPEFTConfig, pairs: Sequence[LoraPair]) -> None:
        super().__init__()
        self.config = config
        self.pairs = nn.ModuleList(pairs)
        self._by_site: dict[str, list[LoraPair]] = {}
        for pair in pairs:
            self._by_site.setdefault(pair.target.site, []).append(pair)

    @classmethod
    def create(cls, base: Base, config: LoraPEFTConfig) -> Self:
        """Fresh weights for every target of `config` in `base`. Raises AdapterError when nothing matches."""
        fused = config.variant == "nemo"
        targets = resolve_targets(base, config.target_modules, fused=fused)
        targets = select_layers(targets, config.layer_selection, base.depth)
        linears = {linear.site.name: linear for linear in base.linears()}
        for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            require_matches(name, patterns, targets)
        pairs: list[LoraPair] = []
        for target in targets:
            rank_key, alpha_key = target.match(config.rank_pattern), target.match(config.alpha_pattern)
            rank = config.rank_pattern[rank_key] if rank_key is not None else config.adapter_dim
            alpha = config.alpha_of(rank, alpha_key)
            magnitude = weight_norms(linears[target.site], target) if config.use_dora else None
            pair = LoraPair(target, rank, alpha, lora_scale(alpha, rank, config.use_rslora), magnitude)
            init_lora_a(pair.a, config.column_init_method)
            pairs.append(pair)
        return cls(config, pairs)

    @classmethod
    def from_weights(cls, config: LoraPEFTConfig, weights: Sequence[LoraWeights]) -> Self:
        """The trainable form of weights read from disk."""
        pairs: list[LoraPair] = []
        for item in weights:
            pair = LoraPair(item.target, item.a.shape[0], item.alpha, item.scale, item.magnitude)
            pair.a.data.copy_(item.a)
            pair.b.data.copy_(item.b)
            pairs.append(pair)
        return cls(config, pairs)

    def weights(self) -> list[LoraWeights]:
        """A detached fp32 copy on the host, one entry for each target."""
        pairs = [pair for pair in self.pairs if isinstance(pair, LoraPair)]
        return [
            LoraWeights(
                p.target,
                to_host_fp32(p.a),
                to_host_fp32(p.b),
                p.alpha,
                p.scale,
                None if p.magnitude is None else to_host_fp32(p.magnitude),
            )
            for p in pairs
        ]

    @property
    def needs_rng(self) -> bool:
        """For its dropout, while training."""
        return self.training and self.config.adapter_dropout > 0

    def pairs_at(self, site: Site) -> Sequence[LoraPair]:
        """The factors that act at a linear."""
        return self._by_site.get(site.name, ())

    def add_output(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        """Adds the low-rank product. x: [*, K], y: [*, N] -> [*, N]."""
        for pair in self.pairs_at(linear.site):
            y = self._add(pair, x, y)
        return y

    def scale_output(self, linear: Linear, y: Tensor) -> Tensor:
        """Applies DoRA's gates. y: [*, N], the low-rank product included -> [*, N]."""
        for pair in self.pairs_at(linear.site):
            if pair.magnitude is not None:
                scale, shift = magnitude_ratio(linear, pair.target, pair.a, pair.b, pair.scale, pair.magnitude)
                start, end = pair.target.rows
                rows = y[..., start:end] * scale
                rows = rows if shift is None else rows + shift
                y = torch.cat([y[..., :start], rows.to(y.dtype), y[..., end:]], dim=-1)
        return y

    def _add(self, pair: LoraPair, x: Tensor, y: Tensor) -> Tensor:
        rate = self.config.adapter_dropout if self.training else 0.0
        if rate and self.config.dropout_position == "pre":
            x = F.dropout(x, rate)
        delta = F.linear(F.linear(x.to(pair.a.dtype), pair.a), pair.b) * pair.scale
        if rate and self.config.dropout_position == "post":
            delta = F.dropout(delta, rate)
        start, end = pair.target.rows
        before_and_after = (start, y.shape[-1] - end)
        return y + (F.pad(delta, before_and_after) if any(before_and_after) else delta).to(y.dtype)


def init_lora_a(weight: Tensor, method: str) -> None:
    """Fills A in place. "normal" is NeMo's N(0, 0.2); "kaiming" is Hugging Face's (a = √5)."""
    if method == "xavier":
        nn.init.xavier_normal_(weight)
    elif method == "normal":
        nn.init.normal_(weight, std=0.2)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
