"""One adapter in its trainable form: the modules of its methods, together a seam for the base."""

from collections.abc import Sequence

from torch import Tensor, nn

from quiver_peft.adapters.lora import LoraModule, LoraPEFTConfig
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.sites import Linear, Site
from quiver_peft.errors import AdapterError

PEFTConfig = LoraPEFTConfig


class Adapter(nn.Module):
    """The methods of one adapter, applied in the order of the list at every site they touch."""

    def __init__(self, methods: Sequence[LoraModule]) -> None:
        super().__init__()
        names = [method.method for method in methods]
        if len(set(names)) != len(names):
            raise AdapterError(f"an adapter holds each method at most once, not {', '.join(names)}")
        self.methods = nn.ModuleList(methods)
        self._methods = list(methods)

    @classmethod
    def create(cls, base: GPTBase, configs: Sequence[PEFTConfig]) -> "Adapter":
        """A new adapter that equals the base until it is trained."""
        if not configs:
            raise AdapterError("an adapter needs at least one method; leave add_adapter out for full fine-tuning")
        return cls([LoraModule.create(base, config) for config in configs])

    @property
    def lora(self) -> LoraModule | None:
        """The LoRA of this adapter, if it has one."""
        return next((method for method in self._methods if method.method == "lora"), None)

    def embed(self, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """The base's own word embeddings."""
        return embedding(tokens)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """The base's linear and what each method adds. x: [*, K] -> [*, N]."""
        y = linear(x)
        for method in self._methods:
            y = method.after_linear(linear, x, y)
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """The sub-layer's own output."""
        return out
