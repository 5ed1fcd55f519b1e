"""The settings of a `.nemo` adapter: `model_config.yaml`, held against a base and taken apart, strictly.

Defaults and meaning: NeMo 1.23 and 2.0, `nemo/collections/nlp/parts/peft_config.py`.
"""

from collections.abc import Mapping
from typing import Any

from quiver_peft.adapters.formats.nemo.archive import CONFIG_MEMBER
from quiver_peft.base.base import Base
from quiver_peft.base.config import T5Config
from quiver_peft.errors import AdapterError, BaseMismatchError

_LORA_PLACES = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
_SHORTHANDS = {"attention": _LORA_PLACES[:2], "mlp": _LORA_PLACES[2:], "all": _LORA_PLACES}
# peft_scheme -> where its settings are. How weights started, and how they lie in memory, says nothing about them now.
_SECTIONS = {"adapter": "adapter_tuning", "ia3": "ia3_tuning", "lora": "lora_tuning", "ptuning": "p_tuning"}
_BOTH = ("adapter_dim", "adapter_dropout", "column_init_method", "row_init_method", "layer_selection", "weight_tying")
_FIELDS: dict[str, set[str]] = {
    "adapter": {*_BOTH, "position_embedding_strategy", "norm_position", "norm_type", "type"},
    "ia3": {"layer_selection"},
    "lora": {
        *(*_BOTH, "position_embedding_strategy", "alpha", "dropout_position", "target_modules", "variant"),
        "a2a_experimental",
    },
    "ptuning": {"virtual_tokens", "bottleneck_dim", "embedding_dim", "init_std"},
}
_OTHER_SCHEMES = {
    "qlora": "it belongs to a base whose weights were quantised, which is another base",
    "selective": "it changes the base's own weights",
    "mlp_head": "it is no adapter of a language model",
    "sdlora": "it is for Stable Diffusion",
}


class Settings:
    """One scheme's settings; errors name the field and its value."""

    def __init__(self, scheme: str, values: Mapping[str, Any]) -> None:
        self.section = _SECTIONS[scheme]
        self._values = values
        for key, value in values.items():
            if key not in _FIELDS[scheme] and value:
                raise self.error(key, "is not known (it might change the result)")

    def error(self, key: str, rule: str) -> AdapterError:
        """What is wrong with a field."""
        return AdapterError(f"{CONFIG_MEMBER}: peft.{self.section}.{key} = {self._values.get(key)!r} {rule}")

    def whole(self, key: str) -> int:
        """A whole number above zero, which must be there."""
        value = self._values.get(key)
        if type(value) is not int or value < 1:
            raise self.error(key, "must be a whole number above zero")
        return value

    def number(self, key: str, default: float) -> float:
        """Any number; null counts as not given."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, "must be a number")
        return float(value)

    def choice(self, key: str, default: str | None, known: tuple[str | None, ...]) -> Any:
        """One of `known`."""
        value: Any = self._values.get(key, default)
        if value not in known:
            raise self.error(key, f"must be one of {', '.join(map(str, known))}")
        return value

    def layers(self) -> list[int] | None:
        """layer_selection, from 1; None: all. An empty list means all too, as to NeMo."""
        value: Any = self._values.get("layer_selection") or None
        if value is not None and not (isinstance(value, list) and all(type(number) is int for number in value)):
            raise self.error("layer_selection", "must be a list of whole numbers")
        return value

    def places(self) -> tuple[str, ...]:
        """target_modules, their shorthands written out."""
        value: Any = self._values.get("target_modules", list(_LORA_PLACES[:1]))
        known = (*_LORA_PLACES, *_SHORTHANDS)
        if not isinstance(value, list) or not value or any(name not in known for name in value):
            raise self.error("target_modules", f"must be a list of {', '.join(known)}")
        found = [place for name in value for place in _SHORTHANDS.get(name, (name,))]
        return tuple(dict.fromkeys(found))

    def is_tied(self) -> bool:
        """weight_tying. A position that is learned for each layer besides is not supported."""
        tied = bool(self._values.get("weight_tying"))
        if tied and self._values.get("position_embedding_strategy") is not None:
            raise self.error("position_embedding_strategy", "with weight_tying is not supported; only null is")
        return tied


def read_settings(config: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of each scheme of `peft_scheme`. Raises AdapterError."""
    peft: Any = config.get("peft")
    if not isinstance(peft, dict) or not isinstance(peft.get("peft_scheme"), str):
        scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
        raise AdapterError(f"{CONFIG_MEMBER}: peft.peft_scheme = {scheme!r}: this is no adapter")
    schemes = [scheme.strip() for scheme in peft["peft_scheme"].split(",")]
    found: dict[str, Settings] = {}
    for scheme in schemes:
        if scheme not in _SECTIONS:
            reason = _OTHER_SCHEMES.get(scheme, f"known: {', '.join(_SECTIONS)}")
            raise AdapterError(f"{CONFIG_MEMBER}: peft.peft_scheme {scheme!r} is not supported; {reason}")
        section: Any = peft.get(_SECTIONS[scheme], {})
        if scheme in found or not isinstance(section, dict):
            raise AdapterError(f"{CONFIG_MEMBER}: peft.{_SECTIONS[scheme]} must hold one scheme's settings")
        found[scheme] = Settings(scheme, section)
    return found


def check_base(base: Base, config: Mapping[str, Any]) -> None:
    """Raises AdapterError for a model on which adapters act otherwise; BaseMismatchError for another one's shapes."""
    for key, known in (
        ("megatron_legacy", False),
        ("transformer_block_type", "pre_ln"),
        ("num_moe_experts", None),
        ("virtual_pipeline_model_parallel_size", None),
    ):
        if config.get(key) not in (known, None):
            raise AdapterError(f"{CONFIG_MEMBER}: {key} = {config[key]!r} is not supported; only {known!r} is")
    shape = base.config
    for where, part in (("", config), ("encoder.", config.get("encoder")), ("decoder.", config.get("decoder"))):
        if not isinstance(part, dict) or part.get("num_attention_heads") is None:
            continue
        heads, hidden = part["num_attention_heads"], part.get("hidden_size", shape.hidden_size)
        depth = shape.num_encoder_layers if where == "encoder." and isinstance(shape, T5Config) else shape.num_layers
        expected = {
            "num_attention_heads": (heads, shape.num_heads),
            "hidden_size": (hidden, shape.hidden_size),
            "num_query_groups": (part.get("num_query_groups") or heads, shape.num_kv_heads),
            "kv_channels": (part.get("kv_channels") or hidden // heads, shape.head_dim),
            "ffn_hidden_size": (part.get("ffn_hidden_size", shape.ffn_size), shape.ffn_size),
            "num_layers": (part.get("num_layers", depth), depth),
        }
        for key, (theirs, ours) in expected.items():
            if theirs != ours:
                raise BaseMismatchError(f"{CONFIG_MEMBER}: {where}{key} is {theirs}, of this base {ours}")
