"""One adapter in its trainable form: the modules of its methods, together a seam for the base."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.bottleneck_module import BottleneckModule
from quiver_peft.adapters.methods.configs import METHOD_ORDER, PEFTConfig
from quiver_peft.adapters.methods.ia3 import IA3Module, IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraModule, LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixModule, PrefixPEFTConfig
from quiver_peft.adapters.methods.prompt import PromptModule
from quiver_peft.adapters.weights import AdapterWeights, fold_scales
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear, Site, StackName
from quiver_peft.errors import AdapterError

AnyMethod = LoraModule | IA3Module | BottleneckModule | PrefixModule | PromptModule


class TrainableAdapter(nn.Module):
    """The methods of one adapter, applied in the order of `METHOD_ORDER` at every site they touch.

    Every sequence given to a stack of the base must begin with `num_virtual_in(stack)` placeholders (any id).
    """

    def __init__(self, methods: Sequence[AnyMethod]) -> None:
        super().__init__()
        names = [method.name for method in methods]
        if len(set(names)) != len(names) or {"ptuning", "prompt_tuning"} <= set(names):
            raise AdapterError(f"an adapter holds each method at most once, not {', '.join(names)}")
        self._methods = sorted(methods, key=lambda method: METHOD_ORDER.index(method.name))
        self.methods = nn.ModuleList(self._methods)

    @classmethod
    def create(cls, base: Base, configs: Sequence[PEFTConfig]) -> "TrainableAdapter":
        """A new adapter. Until it is trained it equals the base, virtual tokens excepted."""
        if not configs:
            raise AdapterError("an adapter needs at least one method; leave add_adapter out for full fine-tuning")
        return cls([_new_module(base, config) for config in configs])

    @classmethod
    def from_weights(cls, base: Base, weights: AdapterWeights) -> "TrainableAdapter":
        """The trainable form of weights read from disk."""
        return cls([_module_of(base, config, weights) for config in weights.configs])

    def num_virtual_in(self, stack: StackName) -> int:
        """Virtual tokens before every sequence of a stack; "" is the only one of a decoder-only base."""
        return sum(method.num_virtual_in(stack) for method in self._methods)

    @property
    def ordered_methods(self) -> Sequence[AnyMethod]:
        """In the order in which they act."""
        return self._methods

    @property
    def needs_rng(self) -> bool:
        """Whether a pass through it needs random numbers, as dropout does while training."""
        return any(method.needs_rng for method in self._methods)

    @property
    def lora(self) -> LoraModule | None:
        """The LoRA of this adapter, if it has one."""
        return next((method for method in self._methods if isinstance(method, LoraModule)), None)

    @property
    def configs(self) -> tuple[PEFTConfig, ...]:
        """The configuration of each method, in the order in which they act."""
        return tuple(method.config for method in self._methods)

    def weights(self, base: Base) -> AdapterWeights:
        """A detached fp32 copy of everything on the host; the revision is for whoever writes it."""
        weights = self.stored_weights()
        return replace(weights, scales=fold_scales(base, weights.lora, weights.ia3))

    def stored_weights(self) -> AdapterWeights:
        """The same without the scales that are folded for serving: what a file holds."""
        weights = AdapterWeights("", self.configs)
        for method in self._methods:
            if isinstance(method, LoraModule):
                weights = replace(weights, lora=tuple(method.weights()))
            elif isinstance(method, IA3Module):
                weights = replace(weights, ia3=tuple(method.weights()))
            elif isinstance(method, BottleneckModule):
                weights = replace(weights, bottlenecks=tuple(method.weights()))
            elif isinstance(method, PrefixModule):
                weights = replace(weights, prefix=method.weights())
            else:
                weights = replace(weights, prompt=method.weights())
        return weights

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """Word embeddings, the placeholders' replaced. tokens: [B, S] -> [B, S, D]."""
        embedded = embedding(tokens)
        virtual: list[Tensor] = []
        for method in self._methods:
            if number := method.num_virtual_in(site.stack):
                rows = method.virtual_embeddings()
                virtual.append(embedded.new_zeros(number, embedded.shape[-1]) if rows is None else rows)
        if not virtual:
            return embedded
        rows = torch.cat([part.to(embedded.dtype) for part in virtual])
        rest = embedded[..., rows.shape[0] :, :]
        return torch.cat([rows.expand(*embedded.shape[:-2], -1, -1), rest], dim=-2)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """The base's linear and what each method does around it. x: [*, K] -> [*, N]."""
        for method in self._methods:
            x = method.scale_input(linear, x)
        x = linear.gather_input(x)
        y = linear.matmul(x)
        for method in self._methods:
            y = method.add_output(linear, x, y)
        y = linear.reduce_output(y)
        for method in self._methods:
            y = method.scale_output(linear, y)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """What is added to the residual stream. out, residual: [*, D] -> [*, D]."""
        for method in self._methods:
            out = method.sublayer(site, out, residual)
        return out

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of a prefix in the first rows. k, v: [B, S, G, E]."""
        first = 0
        for method in self._methods:
            number = method.num_virtual_in(site.stack)
            found = method.virtual_key_values(site.layer) if number else None
            if found is not None:
                k, v = (_replace_rows(old, new, first) for old, new in zip((k, v), found, strict=True))
            first += number
        return k, v


def _replace_rows(old: Tensor, new: Tensor, first: int) -> Tensor:
    """Rows [first, first + n) of every sequence. old: [B, S, G, E], new: [n, G, E]."""
    rows = new.to(old.dtype).expand(old.shape[0], -1, -1, -1)
    return torch.cat([old[:, :first], rows, old[:, first + new.shape[0] :]], dim=1)


def _new_module(base: Base, config: PEFTConfig) -> AnyMethod:
    if isinstance(config, LoraPEFTConfig):
        return LoraModule.create(base, config)
    if isinstance(config, IA3PEFTConfig):
        return IA3Module.create(base, config)
    if isinstance(config, CanonicalAdaptersPEFTConfig):
        return BottleneckModule.create(base, config)
    if isinstance(config, PrefixPEFTConfig):
        return PrefixModule.create(base, config)
    return PromptModule.create(base, config)


def _module_of(base: Base, config: PEFTConfig, weights: AdapterWeights) -> AnyMethod:
    if isinstance(config, LoraPEFTConfig):
        return LoraModule.from_weights(config, weights.lora)
    if isinstance(config, IA3PEFTConfig):
        return IA3Module.from_weights(config, weights.ia3)
    if isinstance(config, CanonicalAdaptersPEFTConfig):
        return BottleneckModule.from_weights(base, config, weights.bottlenecks)
    if isinstance(config, PrefixPEFTConfig):
        assert weights.prefix is not None
        return PrefixModule.from_weights(config, weights.prefix, base.config)
    assert weights.prompt is not None
    return PromptModule.from_weights(config, weights.prompt)
