"""IA3 (Liu et al. 2022): learned scales, one number for each feature, on keys, values and the MLP's inner activations.

    k' = l_k · k      v' = l_v · v      mlp = down(l_ff · act)

Shapes: * any leading dimensions, K inputs and N outputs of the scaled rows of a linear.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from quiver_peft.adapters.methods.method import Method
from quiver_peft.adapters.methods.targets import Target, matches_module, module_targets, resolve_targets, select_layers
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear
from quiver_peft.errors import AdapterError


@dataclass(frozen=True)
class IA3PEFTConfig:
    """What to train: NeMo 1.x's `IA3PEFTConfig` where no modules are named, else Hugging Face PEFT's `IA3Config`.

    target_modules: checkpoint module names whose output is scaled; None: keys, values, and the input of the MLP's
        second linear.
    feedforward_modules: those of target_modules whose input is scaled instead.
    layer_selection: numbers of layers, from 1; None means all.
    """

    target_modules: Sequence[str] | str | None = None
    feedforward_modules: Sequence[str] | str | None = None
    layer_selection: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.target_modules is None and self.feedforward_modules:
            raise AdapterError("IA3: feedforward_modules needs target_modules, which must name them too")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "ia3", **asdict(self)}


@dataclass(frozen=True)
class IA3Weights:
    """One scale on the host, fp32. scale: [K] where on_input, else [N]."""

    target: Target
    scale: Tensor
    on_input: bool


class IA3Scale(nn.Module):
    """One trainable scale."""

    def __init__(self, target: Target, on_input: bool) -> None:
        super().__init__()
        self.target = target
        self.on_input = on_input
        self.scale = nn.Parameter(torch.ones(target.in_features if on_input else target.num_rows))


class IA3Module(Method):
    """Trainable IA3 of one adapter. Scales start at one: a new adapter equals the base bit for bit."""

    name = "ia3"

    def __init__(self, config: IA3PEFTConfig, scales: Sequence[IA3Scale]) -> None:
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(scales)
        self._inputs = {scale.target.site: scale for scale in scales if scale.on_input}
        self._outputs: dict[str, list[IA3Scale]] = {}
        for scale in scales:
            if not scale.on_input:
                self._outputs.setdefault(scale.target.site, []).append(scale)

    @classmethod
    def create(cls, base: Base, config: IA3PEFTConfig) -> Self:
        """Ones for every target of `config` in `base`. Raises AdapterError when nothing matches."""
        targets = scaled_targets(base, config)
        return cls(config, [IA3Scale(target, on_input) for target, on_input in targets])

    @classmethod
    def from_weights(cls, config: IA3PEFTConfig, weights: Sequence[IA3Weights]) -> Self:
        """The trainable form of weights read from disk."""
        scales: list[IA3Scale] = []
        for item in weights:
            scale = IA3Scale(item.target, item.on_input)
            scale.scale.data.copy_(item.scale)
            scales.append(scale)
        return cls(config, scales)

    def weights(self) -> list[IA3Weights]:
        """A detached fp32 copy on the host, one entry for each target."""
        scales = [scale for scale in self.scales if isinstance(scale, IA3Scale)]
        return [IA3Weights(scale.target, to_host_fp32(scale.scale), scale.on_input) for scale in scales]

    def scale_input(self, linear: Linear, x: Tensor) -> Tensor:
        """x: [*, K] -> [*, K]."""
        scale = self._inputs.get(linear.site.name)
        return x if scale is None else (x * scale.scale).to(x.dtype)

    def scale_output(self, linear: Linear, y: Tensor) -> Tensor:
        """y: [*, N] -> [*, N]."""
        scales = self._outputs.get(linear.site.name)
        if not scales:
            return y
        whole = torch.ones(y.shape[-1], device=y.device)
        for scale in scales:
            whole = whole.index_copy(0, torch.arange(*scale.target.rows, device=y.device), scale.scale)
        return (y * whole).to(y.dtype)


def scaled_targets(base: Base, config: IA3PEFTConfig) -> list[tuple[Target, bool]]:
    """The targets of a configuration, each with whether its input is scaled."""
    if config.target_modules is None:
        places = [
            *((part, False) for linear in base.linears() for part in _key_and_value(linear)),
            *((Target.of(linear.site.name, linear, ""), True) for linear in base.linears() if _ends_mlp(linear)),
        ]
        named = {(target.site, target.part): target for target in module_targets(base).values()}
        found = [(named.get((target.site, target.part), target), on_input) for target, on_input in places]
    else:
        feedforward = config.feedforward_modules or ()
        targets = resolve_targets(base, config.target_modules, fused=False)
        found = [(target, bool(feedforward) and matches_module(feedforward, target.name)) for target in targets]
    kept = select_layers([target for target, _ in found], config.layer_selection, base.depth)
    chosen = {(target.site, target.part) for target in kept}
    result = [(target, on_input) for target, on_input in found if (target.site, target.part) in chosen]
    refuse_part_inputs(result)
    return result


def refuse_part_inputs(targets: Sequence[tuple[Target, bool]]) -> None:
    """Raises AdapterError where the input of one part of a fused linear would be scaled and its others' would not."""
    for target, on_input in targets:
        if on_input and target.part:
            raise AdapterError(
                f"feedforward_modules: {target.name!r} shares its input with other modules, which are computed "
                "together; only modules with an input of their own can have it scaled"
            )


def _key_and_value(linear: Linear) -> list[Target]:
    parts = ("k", "v") if linear.site.kind in ("attention.qkv", "cross_attention.kv") else ()
    return [Target.of(f"{linear.site.name}.{part}", linear, part) for part in parts]


def _ends_mlp(linear: Linear) -> bool:
    return linear.site.kind == "mlp.down"
