"""Which rows of which linear an adapter acts on: NeMo's places and Hugging Face's module names, resolved on a base."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quiver_peft.base.base import Base
from quiver_peft.base.sites import Linear
from quiver_peft.errors import AdapterError

_CROSS_ATTENTION = ("cross_attention.q", "cross_attention.kv", "cross_attention.out")

# NeMo `peft_config.py`: target_modules and their shorthands -> kinds of sites.
NEMO_PLACES: dict[str, tuple[str, ...]] = {
    "attention_qkv": ("attention.qkv",),
    "attention_dense": ("attention.out",),
    "mlp_fc1": ("mlp.up",),
    "mlp_fc2": ("mlp.down",),
    "attention": ("attention.qkv", "attention.out"),
    "mlp": ("mlp.up", "mlp.down"),
    # As in NeMo, the names above leave T5's cross-attention out; these two do not.
    "cross_attention": _CROSS_ATTENTION,
    "all": ("attention.qkv", "attention.out", "mlp.up", "mlp.down", *_CROSS_ATTENTION),
}


@dataclass(frozen=True)
class Target:
    """Rows [start, end) of the linear at a site; part "" means all of them.

    name: the module's name in the base's checkpoint, or the site's where it spans several modules.
    """

    name: str
    site: str
    part: str
    rows: tuple[int, int]
    in_features: int

    @property
    def layer(self) -> int:
        """Which layer, from 0."""
        return int(self.site.rpartition("layers.")[2].partition(".")[0])

    @property
    def num_rows(self) -> int:
        """N of the formulas."""
        return self.rows[1] - self.rows[0]

    @classmethod
    def of(cls, name: str, linear: Linear, part: str) -> "Target":
        """The target of a checkpoint's module name."""
        rows = linear.parts[part] if part else (0, linear.out_features)
        return cls(name, linear.site.name, part, rows, linear.in_features)

    def match(self, patterns: Mapping[str, object]) -> str | None:
        """The first key that matches the end of the name, as Hugging Face's `get_pattern_key` does."""
        return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", self.name)), None)


def module_targets(base: Base) -> dict[str, Target]:
    """Every module name of the base's checkpoint that an adapter may name -> its target."""
    return {name: Target.of(name, linear, part) for name, (linear, part) in base.checkpoint_linears().items()}


def matches_module(names: Sequence[str] | str, module: str) -> bool:
    """Hugging Face's rule (`check_target_module_exists`): a string is a regular expression, a list holds endings."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def resolve_targets(base: Base, names: Sequence[str] | str, *, fused: bool) -> list[Target]:
    """The targets that `names` mean on this base, in the order of its linears, each once.

    fused: a NeMo place is one target over all its parts, else one target for each module of the checkpoint in it.
    Raises AdapterError for a name that matches nothing.
    """
    modules = module_targets(base)
    if not names:
        raise AdapterError(f"target_modules is empty; name at least one of {', '.join(_places(base))} or a module")
    if isinstance(names, str) and names not in NEMO_PLACES:
        require_expression("target_modules", names)
        found = [target for module, target in modules.items() if matches_module(names, module)]
        _require(bool(found), names, base)
        return found
    chosen: dict[tuple[str, str], Target] = {}
    for name in [names] if isinstance(names, str) else names:
        if name in NEMO_PLACES:
            matched = _place_targets(base, modules, name, fused)
        else:
            matched = [target for module, target in modules.items() if matches_module([name], module)]
        _require(bool(matched), name, base)
        chosen.update({(target.site, target.part): target for target in matched})
    _refuse_overlap(chosen.values())
    return list(chosen.values())


def select_layers(targets: Sequence[Target], numbers: Sequence[int] | None, num_layers: int) -> list[Target]:
    """The targets in the layers of these numbers, from 1 (NeMo's `layer_selection`); all where None.

    Raises AdapterError for a number that is no layer's, and when nothing is left.
    """
    if numbers is None:
        return list(targets)
    require_layers(numbers, num_layers)
    kept = [target for target in targets if target.layer + 1 in numbers]
    if not kept:
        raise AdapterError(f"layer_selection: no target lies in the layers {list(numbers)}")
    return kept


def require_layers(numbers: Sequence[int], num_layers: int) -> None:
    """Raises AdapterError for a number that is no layer's, or where there is none.

    In an encoder-decoder a number means that layer of either stack.
    """
    if not numbers:
        raise AdapterError("layer_selection is empty; leave it out to adapt all layers")
    for number in numbers:
        if not 1 <= number <= num_layers:
            raise AdapterError(
                f"layer_selection: {number} is no layer of this base; they are numbered 1 to {num_layers}"
            )


def _place_targets(base: Base, modules: Mapping[str, Target], place: str, fused: bool) -> list[Target]:
    kinds = NEMO_PLACES[place]
    linears = [linear for linear in base.linears() if linear.site.kind in kinds]
    if not fused:
        sites = {linear.site.name for linear in linears}
        return [target for target in modules.values() if target.site in sites]
    # A linear that is one module of the checkpoint keeps that module's name.
    whole = {target.site: target for target in modules.values() if not target.part}
    return [whole.get(linear.site.name) or Target.of(linear.site.name, linear, "") for linear in linears]


def require_matches(field: str, patterns: Iterable[str], targets: Sequence[Target]) -> None:
    """Raises AdapterError for a key of rank_pattern or alpha_pattern that is about no target: it would do nothing."""
    for key in patterns:
        require_expression(field, key)
        if all(target.match({key: None}) is None for target in targets):
            raise AdapterError(f"{field}: {key!r} matches no target; they are {', '.join(t.name for t in targets[:4])}")


def require_expression(field: str, text: str) -> None:
    """Raises AdapterError for a text that cannot be part of a regular expression."""
    try:
        re.compile(f"({text})")
    except re.error as error:
        raise AdapterError(f"{field}: {text!r} is not a regular expression: {error}") from None


def _places(base: Base) -> list[str]:
    """NeMo's names of what this base has."""
    kinds = {linear.site.kind for linear in base.linears()}
    return [place for place, members in NEMO_PLACES.items() if kinds & set(members)]


def _require(found: bool, name: str, base: Base) -> None:
    if not found:
        endings = sorted({module.rpartition(".")[2] for module in module_targets(base)})
        raise AdapterError(
            f"target_modules: {name!r} matches no linear of this base; "
            f"use one of {', '.join(_places(base))} or a module name such as {', '.join(endings)}"
        )


def _refuse_overlap(targets: Iterable[Target]) -> None:
    parts: dict[str, set[str]] = {}
    for target in targets:
        parts.setdefault(target.site, set()).add(target.part)
    for site, names in parts.items():
        if "" in names and len(names) > 1:
            raise AdapterError(
                f"target_modules: {site} is named as a whole and by its parts; "
                "with variant 'nemo' name the place only, or choose variant 'canonical'"
            )
