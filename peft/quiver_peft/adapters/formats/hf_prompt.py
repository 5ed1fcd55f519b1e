"""Soft prompts and prefixes in Hugging Face PEFT's form: one tensor, `prompt_embeddings`, read strictly.

Format: peft 0.21 `tuners/{prompt_tuning,p_tuning,prefix_tuning}`. P-Tuning's network is not saved, only what it makes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quiver_peft.adapters.formats.hf_common import check_task_type
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig, PrefixWeights
from quiver_peft.adapters.methods.prompt import PromptTuningPEFTConfig, PromptWeights, PtuningPEFTConfig
from quiver_peft.adapters.methods.virtual_tokens import require_room
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError, BaseMismatchError

KEY = "prompt_embeddings"
_SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
# How the table was made says nothing about what it does.
_HARMLESS_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    *("prefix_projection", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs",),
}

PromptConfig = PtuningPEFTConfig | PromptTuningPEFTConfig | PrefixPEFTConfig


def read_hf_prompt(
    base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[PromptConfig, PromptWeights | PrefixWeights]:
    """Validated weights for `base`. Raises AdapterError; BaseMismatchError."""
    _check_config(base, config)
    if set(tensors) != {KEY}:
        raise AdapterError(f"adapter_model.safetensors: must hold {KEY!r} and nothing else, not {sorted(tensors)}")
    rows, n = tensors[KEY].float(), int(config["num_virtual_tokens"])
    is_prefix = config["peft_type"] == "PREFIX_TUNING"
    kv_size = base.config.num_kv_heads * base.config.head_dim
    width = 2 * base.config.num_layers * kv_size if is_prefix else base.config.hidden_size
    num_rows = n if is_prefix else n * _num_submodules(base)
    if rows.ndim != 2 or rows.shape[0] != num_rows:
        raise AdapterError(
            f"adapter_model.safetensors: {KEY} has shape {list(rows.shape)}; by num_virtual_tokens of "
            f"adapter_config.json it must have {num_rows} rows"
        )
    if rows.shape[1] != width:
        raise BaseMismatchError(
            f"adapter_model.safetensors: {KEY} has rows of {rows.shape[1]} numbers, this base needs {width}"
        )
    require_room(base, n)
    rows = rows[:n]
    if is_prefix:
        return PrefixPEFTConfig(n), PrefixWeights.from_rows(rows, base.config)
    if config["peft_type"] == "P_TUNING":
        return PtuningPEFTConfig(n), PromptWeights(rows.contiguous())
    return PromptTuningPEFTConfig(n), PromptWeights(rows.contiguous())


def _check_config(base: Base, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _HARMLESS_FIELDS and key not in _SIZES and value:
            raise AdapterError(f"adapter_config.json: {key} = {value!r} is not supported (it would change the result)")
    check_task_type(base, config)
    for key in _SIZES:
        value = config.get(key)
        if (value is not None or key == "num_virtual_tokens") and (type(value) is not int or value < 1):
            raise AdapterError(f"adapter_config.json: {key} must be a positive whole number, not {value!r}")
    if config.get("num_transformer_submodules") not in (None, _num_submodules(base)):
        raise BaseMismatchError(
            f"adapter_config.json: num_transformer_submodules = {config['num_transformer_submodules']}: this base has "
            f"{_num_submodules(base)} (an encoder-decoder has 2, a decoder 1)"
        )
    # PEFT writes an encoder's number of layers for the decoder's: the table's own width is checked besides.
    if config.get("num_layers") not in (None, base.config.num_layers, base.depth):
        raise BaseMismatchError(
            f"adapter_config.json: num_layers {config['num_layers']} is another base's; this one has "
            f"{base.config.num_layers}"
        )


def write_hf_prompt(
    base: Base, config: PromptConfig, weights: PromptWeights | PrefixWeights, base_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and its tensor."""
    shape = base.config
    common = {
        "task_type": base.hf_task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_virtual_tokens": config.virtual_tokens,
        "num_transformer_submodules": _num_submodules(base),
        "num_layers": shape.num_layers,
    }
    if isinstance(weights, PrefixWeights):
        # PEFT calls the key-value heads so, and their total width the token's.
        sizes = {"token_dim": shape.num_kv_heads * shape.head_dim, "num_attention_heads": shape.num_kv_heads}
        # What is written are the rows themselves, whatever made them.
        made = {"encoder_hidden_size": sizes["token_dim"], "prefix_projection": False}
        return {"peft_type": "PREFIX_TUNING", **common, **sizes, **made}, {KEY: weights.to_rows()}
    sizes = {"token_dim": shape.hidden_size, "num_attention_heads": shape.num_heads}
    if isinstance(config, PtuningPEFTConfig):
        made = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": shape.hidden_size}
        return {"peft_type": "P_TUNING", **common, **sizes, **made}, {KEY: _table(base, weights)}
    return {"peft_type": "PROMPT_TUNING", **common, **sizes, "prompt_tuning_init": "RANDOM"}, {
        KEY: _table(base, weights)
    }


def _num_submodules(base: Base) -> int:
    return 2 if base.hf_task_type == "SEQ_2_SEQ_LM" else 1


def _table(base: Base, weights: PromptWeights) -> Tensor:
    """PEFT keeps rows for the decoder of an encoder-decoder too, and never uses them."""
    return weights.table.repeat(_num_submodules(base), 1)
