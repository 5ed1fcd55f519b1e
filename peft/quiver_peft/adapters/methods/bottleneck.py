"""Canonical adapters (Houlsby et al. 2019; NeMo 1.x `CanonicalAdaptersPEFTConfig`): what they are and where.

    a [*, D] ── norm ── down ── [*, R] ── act ── up ── [*, D]
    a' = a + up(act(down(norm(a))))

for the output a of attention and of the MLP, before it is added to the residual stream.
Shapes: * any leading dimensions, D hidden size, R width of the bottleneck.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from quiver_peft.adapters.methods.targets import require_layers
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear, Site
from quiver_peft.errors import AdapterError
from quiver_peft.kernels.grouped_bottleneck import Activation, BottleneckAtSite, NormPosition, Source

PLACES = ("attention", "mlp")
_ALL_PLACES = (*PLACES, "cross_attention")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "norm_position": ("pre", "post", None),
    "column_init_method": ("xavier", "normal", "kaiming", "zero"),
    "activation": ("swish", "relu", "gelu", "gelu_tanh"),
    "source": ("output", "output_before_bias", "sum", "residual"),
}
# The linear that a sub-layer ends with, whose bias is in the sub-layer's output.
_LAST_LINEARS = {"attention": "attention.out", "cross_attention": "cross_attention.out", "mlp": "mlp.down"}


@dataclass(frozen=True)
class CanonicalAdaptersPEFTConfig:
    """What to train. Names and defaults follow NeMo 1.x; the last three describe adapters made by others.

    adapter_dim: width of the bottleneck. norm_position: a LayerNorm on what enters ("pre") or on what is added
        ("post"); None: none. column_init_method: how `down` starts; `up` starts at zero.
    weight_tying: one bottleneck for all layers (of each place). layer_selection: numbers of layers, from 1; None: all.
    places: after which sub-layers; T5's "cross_attention" is not among the defaults, as in NeMo and AdapterHub.
    bias: of both linears. scale: on what is added.
    source: what enters: the sub-layer's output, or that without the bias of its last linear (NeMo; the same in bases
        without such biases), its sum with the residual (Pfeiffer), the residual alone (parallel).
    """

    adapter_dim: int = 32
    adapter_dropout: float = 0.0
    norm_position: NormPosition | None = "pre"
    column_init_method: Literal["xavier", "normal", "kaiming", "zero"] = "xavier"
    activation: Activation = "swish"
    weight_tying: bool = False
    layer_selection: Sequence[int] | None = None
    places: Sequence[str] = PLACES
    bias: bool = False
    scale: float = 1.0
    source: Source = "output"

    def __post_init__(self) -> None:
        if self.adapter_dim < 1:
            raise AdapterError(f"canonical: adapter_dim must be at least 1, not {self.adapter_dim}")
        if not 0.0 <= self.adapter_dropout < 1.0:
            raise AdapterError(f"canonical: adapter_dropout must be in [0, 1), not {self.adapter_dropout}")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise AdapterError(f"canonical: scale must be a number other than 0, not {self.scale}")
        if not self.places or not set(self.places) <= set(_ALL_PLACES):
            raise AdapterError(f"canonical: places must be among {', '.join(_ALL_PLACES)}, not {list(self.places)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise AdapterError(f"canonical: {name} must be one of {choices}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "canonical", **asdict(self), "places": list(self.places)}


@dataclass(frozen=True)
class BottleneckWeights:
    """The bottleneck after one sub-layer, on the host, fp32. site: e.g. "layers.3.attention"."""

    site: str
    at_site: BottleneckAtSite

    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of what is there."""
        return bottleneck_tensors(self.at_site)


def bottleneck_tensors(at_site: BottleneckAtSite) -> dict[str, Tensor]:
    """{name as on disk: tensor} of those that are there."""
    found = {
        "down.weight": at_site.down,
        "up.weight": at_site.up,
        "down.bias": at_site.down_bias,
        "up.bias": at_site.up_bias,
        "norm.weight": at_site.norm_weight,
        "norm.bias": at_site.norm_bias,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def bottleneck_shapes(config: CanonicalAdaptersPEFTConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a configuration has at each site, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "down.weight": (config.adapter_dim, hidden_size),
        "up.weight": (hidden_size, config.adapter_dim),
    }
    if config.bias:
        shapes.update({"down.bias": (config.adapter_dim,), "up.bias": (hidden_size,)})
    if config.norm_position is not None:
        shapes.update({"norm.weight": (hidden_size,), "norm.bias": (hidden_size,)})
    return shapes


def weights_at_site(
    config: CanonicalAdaptersPEFTConfig, tensors: Mapping[str, Tensor], out_bias: Tensor | None
) -> BottleneckAtSite:
    """A bottleneck of `config` from its tensors by name. out_bias: see `SublayerBiases`."""
    return BottleneckAtSite(
        tensors["down.weight"],
        tensors["up.weight"],
        tensors.get("down.bias"),
        tensors.get("up.bias"),
        tensors.get("norm.weight"),
        tensors.get("norm.bias"),
        config.norm_position,
        config.activation,
        config.scale,
        config.source,
        out_bias,
    )


class SublayerBiases:
    """The bias in each sub-layer's output, where a configuration wants it left out of what enters a bottleneck."""

    def __init__(self, base: Base, config: CanonicalAdaptersPEFTConfig) -> None:
        wanted = config.source == "output_before_bias"
        self._linears: dict[str, Linear] = {linear.site.name: linear for linear in base.linears()} if wanted else {}

    def at(self, site: str) -> Tensor | None:
        """[D], where the base keeps it; None where there is none to leave out."""
        prefix, dot, kind = site.rpartition(".")
        linear = self._linears.get(prefix + dot + _LAST_LINEARS[kind])
        return None if linear is None or linear.bias is None else linear.bias.detach()


def bottleneck_sites(base: Base, config: CanonicalAdaptersPEFTConfig) -> list[Site]:
    """Where a configuration acts on `base`. Raises AdapterError for a layer that is not there."""
    if config.layer_selection is not None:
        require_layers(config.layer_selection, base.depth)
    missing = set(config.places) - {site.kind for site in base.sublayers}
    if missing:
        raise AdapterError(f"canonical: places: this base has no {', '.join(sorted(missing))}")
    layers = range(base.depth) if config.layer_selection is None else [n - 1 for n in config.layer_selection]
    return [site for site in base.sublayers if site.layer in layers and site.kind in config.places]


def place_of_site(site: str) -> str:
    """A site's name without the layer: those with one name share a tied bottleneck."""
    return re.sub(r"layers\.\d+", "layers", site)
