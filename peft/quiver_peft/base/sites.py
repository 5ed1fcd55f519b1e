"""The seam: the named places of a base where an adapter may act, and the protocol it acts through.

The base knows places, not methods. It calls a `Seam` around each linear, after each sub-layer and on the embedding;
`NO_ADAPTERS` is the identity. The trainer passes one adapter's trainable modules, the server passes the banks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.kernels.packed_linear import PackedWeight, packed_linear

StackName = Literal["", "encoder", "decoder"]


@dataclass(frozen=True)
class Site:
    """A named place in the base.

    name: unique, e.g. "layers.3.attention.qkv", "layers.3.mlp", "encoder.layers.0.mlp", "embedding".
    kind: the name without stack and layer, e.g. "attention.qkv".
    layer: which layer, or -1 outside of the layers.
    stack: "" in a decoder-only base, else "encoder" or "decoder".
    """

    name: str
    kind: str
    layer: int
    stack: StackName = ""

    @classmethod
    def in_layer(cls, layer: int, kind: str, stack: StackName = "") -> "Site":
        """The site of `kind` in layer `layer` of `stack`."""
        prefix = f"{stack}." if stack else ""
        return cls(f"{prefix}layers.{layer}.{kind}", kind, layer, stack)

    @classmethod
    def embedding(cls, stack: StackName = "") -> "Site":
        """Where `stack` embeds its tokens."""
        return cls(f"{stack}.embedding" if stack else "embedding", "embedding", -1, stack)


class Linear(nn.Module):
    """y = x Wᵀ + b at a site; several projections of one input may be fused into its rows.

    weight: [N, K] in the type it is stored in; empty once packed for inference. bias: [N] or None. parts: {name: (first
    row, end row)} of the fused projections, in order; a linear that is not fused has one part.
    """

    def __init__(self, site: Site, in_features: int, parts: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.site = site
        self.in_features = in_features
        self.parts: dict[str, tuple[int, int]] = {}
        out_features = 0
        for name, width in parts.items():
            self.parts[name] = (out_features, out_features + width)
            out_features += width
        self.out_features = out_features
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(out_features, in_features), std=0.02))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K] -> [*, N]."""
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def gather_input(self, x: Tensor) -> Tensor:
        """The input of `matmul`: x itself unless tensor-parallel. x: [*, K]."""
        return x

    def matmul(self, x: Tensor) -> Tensor:
        """The product, to which adapters add theirs before `reduce_output`. x: [*, K] -> [*, N]."""
        return self(x)

    def reduce_output(self, y: Tensor) -> Tensor:
        """The linear's output: y itself unless tensor-parallel. y: [*, N]."""
        return y

    def plain_weight(self) -> Tensor:
        """The weight [N, K], packed or not."""
        return self.weight.detach() if self.packed is None else self.packed.plain()

    def part_rows(self, part: str) -> tuple[int, int]:
        """[first, end) rows of a part in `weight`; "" means all rows."""
        return self.parts[part] if part else (0, self.out_features)

    def row_norms(self, rows: tuple[int, int], delta: Tensor) -> Tensor:
        """‖W + delta‖ of each of the rows [first, end), fp32. delta: [rows, K] -> [rows]."""
        weight = self.plain_weight()[rows[0] : rows[1]].to(delta.device, torch.float32)
        return torch.linalg.vector_norm(weight + delta, dim=1)

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """y: [*, N] -> one [*, width] view for each part."""
        # One split, not several slices: the backward pass of a slice fills a whole [*, N] with zeros.
        return y.split([end - start for start, end in self.parts.values()], dim=-1)


class Seam(Protocol):
    """What an adapter (one while training, a bank of many while serving) does at the sites of a base."""

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """Word embeddings. tokens: [*] int64 -> [*, D]."""
        ...

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """A linear with whatever the adapters add around it. x: [*, K] -> [*, N]."""
        ...

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """What is added to the residual stream. out (of the sub-layer) and residual (before it): [*, D] -> [*, D]."""
        ...

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of an attention sub-layer before they are cached. k, v: [*, G, E], both kept."""
        ...


class NoAdapters:
    """The identity seam: the bare base."""

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """The base's own word embeddings."""
        return embedding(tokens)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """The base's own linear."""
        return linear(x)

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """The sub-layer's own output."""
        return out

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The sub-layer's own keys and values."""
        return k, v


NO_ADAPTERS: Seam = NoAdapters()
