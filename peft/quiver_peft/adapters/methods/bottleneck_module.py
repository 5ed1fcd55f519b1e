"""Canonical adapters in their trainable form: see bottleneck.py.

Shapes: * any leading dimensions, D hidden size.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.adapters.methods.bottleneck import (
    BottleneckWeights,
    CanonicalAdaptersPEFTConfig,
    SublayerBiases,
    bottleneck_shapes,
    bottleneck_sites,
    place_of_site,
    weights_at_site,
)
from quiver_peft.adapters.methods.method import Method
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Site
from quiver_peft.kernels.grouped_bottleneck import bottleneck_delta


class Bottleneck(nn.Module):
    """One trainable bottleneck. It starts adding nothing: `up`, or what a norm after it scales, is zero."""

    def __init__(self, config: CanonicalAdaptersPEFTConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        shapes = bottleneck_shapes(config, hidden_size)
        self.values = nn.ParameterDict({_key(name): torch.zeros(shape) for name, shape in shapes.items()})
        _init_column(self.values["down_weight"], config.column_init_method)
        if config.norm_position is not None:
            nn.init.ones_(self.values["norm_weight"])

    def named_values(self) -> dict[str, Tensor]:
        """{name as on disk: parameter}."""
        return {key.replace("_", "."): value for key, value in self.values.items()}

    def forward(self, out: Tensor, residual: Tensor, out_bias: Tensor | None) -> Tensor:
        """out, residual: [*, D], out_bias: [D] -> [*, D]."""
        delta = bottleneck_delta(weights_at_site(self.config, self.named_values(), out_bias), out, residual)
        if self.training and self.config.adapter_dropout:
            delta = F.dropout(delta, self.config.adapter_dropout)
        return out + delta.to(out.dtype)


class BottleneckModule(Method):
    """Trainable canonical adapters of one adapter, all sites."""

    name = "canonical"

    def __init__(
        self, config: CanonicalAdaptersPEFTConfig, bottlenecks: dict[str, Bottleneck], out_biases: SublayerBiases
    ) -> None:
        super().__init__()
        self.config = config
        self._out_biases = out_biases
        # Tied bottlenecks are there once; a list with repetitions keeps parameters unique all the same.
        self.bottlenecks = nn.ModuleList(dict.fromkeys(bottlenecks.values()))
        self._by_site = bottlenecks

    @classmethod
    def create(cls, base: Base, config: CanonicalAdaptersPEFTConfig) -> Self:
        """Fresh bottlenecks. Raises AdapterError."""
        hidden_size = base.config.hidden_size
        found: dict[str, Bottleneck] = {}
        tied: dict[str, Bottleneck] = {}
        for site in bottleneck_sites(base, config):
            new = Bottleneck(config, hidden_size)
            found[site.name] = tied.setdefault(place_of_site(site.name), new) if config.weight_tying else new
        return cls(config, found, SublayerBiases(base, config))

    @classmethod
    def from_weights(
        cls, base: Base, config: CanonicalAdaptersPEFTConfig, weights: Sequence[BottleneckWeights]
    ) -> Self:
        """The trainable form of weights read from disk; tied ones stay tied."""
        found: dict[str, Bottleneck] = {}
        tied: dict[str, Bottleneck] = {}
        for item in weights:
            place = place_of_site(item.site)
            if config.weight_tying and place in tied:
                found[item.site] = tied[place]
                continue
            bottleneck = Bottleneck(config, item.at_site.up.shape[0])
            for name, tensor in item.tensors().items():
                bottleneck.values[_key(name)].data.copy_(tensor)
            found[item.site] = tied[place] = bottleneck
        return cls(config, found, SublayerBiases(base, config))

    @property
    def needs_rng(self) -> bool:
        """For its dropout, while training."""
        return self.training and self.config.adapter_dropout > 0

    def weights(self) -> list[BottleneckWeights]:
        """A detached fp32 copy on the host, one entry for each site."""
        found: list[BottleneckWeights] = []
        for site, bottleneck in self._by_site.items():
            values = {name: to_host_fp32(value) for name, value in bottleneck.named_values().items()}
            out_bias = self._out_biases.at(site)
            out_bias = None if out_bias is None else to_host_fp32(out_bias)
            found.append(BottleneckWeights(site, weights_at_site(self.config, values, out_bias)))
        return found

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """out, residual: [*, D] -> [*, D]."""
        bottleneck = self._by_site.get(site.name)
        return out if bottleneck is None else bottleneck(out, residual, self._out_biases.at(site.name))


def _key(name: str) -> str:
    return name.replace(".", "_")  # a ParameterDict's keys hold no dots


def _init_column(weight: Tensor, method: str) -> None:
    """NeMo's initialisations of the way down."""
    if method == "xavier":
        nn.init.xavier_normal_(weight)
    elif method == "normal":
        nn.init.normal_(weight, std=0.2)
    elif method == "kaiming":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
