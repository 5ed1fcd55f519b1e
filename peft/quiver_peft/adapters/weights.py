"""One adapter's weights on the host, complete and validated against a base: what disk, trainer and banks exchange."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quiver_peft.adapters.methods.bottleneck import BottleneckWeights
from quiver_peft.adapters.methods.configs import PEFTConfig, method_name
from quiver_peft.adapters.methods.dora import magnitude_ratio
from quiver_peft.adapters.methods.ia3 import IA3Weights
from quiver_peft.adapters.methods.lora import LoraWeights
from quiver_peft.adapters.methods.prefix import PrefixWeights
from quiver_peft.adapters.methods.prompt import PromptWeights
from quiver_peft.base.base import Base
from quiver_peft.kernels.grouped_scale import OutputScale, ScaleAtSite


@dataclass(frozen=True)
class AdapterWeights:
    """All tensors of one adapter, fp32 on the CPU, ready to be placed in the banks.

    scales: what IA3 and DoRA's gates together do at a site, folded for serving; follows from `lora` and `ia3`.
    base_fingerprint: of the base it was made for, as its files say; "" where they do not.
    """

    revision: str
    configs: tuple[PEFTConfig, ...]
    lora: tuple[LoraWeights, ...] = ()
    ia3: tuple[IA3Weights, ...] = ()
    bottlenecks: tuple[BottleneckWeights, ...] = ()
    prompt: PromptWeights | None = None
    prefix: PrefixWeights | None = None
    scales: Mapping[str, ScaleAtSite] = field(default_factory=dict[str, ScaleAtSite])
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    base_fingerprint: str = ""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order in which they act."""
        return tuple(method_name(config) for config in self.configs)

    @property
    def num_prefix_tokens(self) -> int:
        """Virtual tokens that are keys and values only: before every sequence, in T5 before the decoder's."""
        return 0 if self.prefix is None else self.prefix.keys.shape[1]

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual tokens that are embeddings: after the prefix's, in T5 before the encoder's."""
        return 0 if self.prompt is None else self.prompt.table.shape[0]

    @property
    def num_virtual_tokens(self) -> int:
        """All of them."""
        return self.num_prefix_tokens + self.num_prompt_tokens

    @property
    def num_parameters(self) -> int:
        """Trained numbers that serving needs; a prompt encoder, which only training needs, does not count."""
        tensors: list[Tensor | None] = []
        for lora in self.lora:
            tensors += [lora.a, lora.b, lora.magnitude]
        tensors += [item.scale for item in self.ia3]
        for bottleneck in self.bottlenecks:
            tensors += bottleneck.tensors().values()
        if self.prompt is not None:
            tensors.append(self.prompt.table)
        if self.prefix is not None:
            tensors += [self.prefix.keys, self.prefix.values]
        return sum(tensor.numel() for tensor in tensors if tensor is not None)

    @property
    def max_rank(self) -> int:
        """The largest LoRA rank, 0 without LoRA."""
        return max((item.a.shape[0] for item in self.lora), default=0)


def fold_scales(base: Base, lora: Sequence[LoraWeights], ia3: Sequence[IA3Weights]) -> dict[str, ScaleAtSite]:
    """For each site the scale on its input and, in order, those on its outputs: DoRA's gates, then IA3."""
    linears = {linear.site.name: linear for linear in base.linears()}
    inputs = {item.target.site: item.scale for item in ia3 if item.on_input}
    outputs: dict[str, list[OutputScale]] = {}
    for item in lora:
        if item.magnitude is not None:
            scale, shift = magnitude_ratio(
                linears[item.target.site], item.target, item.a, item.b, item.scale, item.magnitude
            )
            outputs.setdefault(item.target.site, []).append(OutputScale(*item.target.rows, scale, shift))
    for item in ia3:
        if not item.on_input:
            outputs.setdefault(item.target.site, []).append(OutputScale(*item.target.rows, item.scale, None))
    sites = [name for name in linears if name in inputs or name in outputs]
    return {site: ScaleAtSite(inputs.get(site), tuple(outputs.get(site, ()))) for site in sites}
