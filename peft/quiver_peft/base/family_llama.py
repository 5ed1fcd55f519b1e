"""Llama checkpoints and their relatives, which differ in biases, norms, windows, MLP: Mistral, Qwen, Nemotron."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quiver_peft.base.config import GPTConfig, read_rope, token_ids
from quiver_peft.base.family import ACTIVATIONS, TensorMapping, choose
from quiver_peft.errors import CheckpointError

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_llama(hf: Mapping[str, Any]) -> GPTConfig:
    """Llama 2 and 3."""
    heads = int(hf["num_attention_heads"])
    head_dim = int(hf.get("head_dim") or hf["hidden_size"] // heads)
    return GPTConfig(
        family="llama",
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        num_layers=int(hf["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        ffn_size=int(hf["intermediate_size"]),
        max_positions=int(hf["max_position_embeddings"]),
        norm="rms",
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        activation=choose(hf, "hidden_act", ACTIVATIONS),
        gated_mlp=True,
        qkv_bias=bool(hf.get("attention_bias", False)),
        out_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope=read_rope(hf, head_dim),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def read_mistral(hf: Mapping[str, Any]) -> GPTConfig:
    """Mistral: Llama whose layers may all look back a limited number of tokens."""
    config = read_llama({**hf, "attention_bias": False, "mlp_bias": False})
    window = hf.get("sliding_window")
    windows = () if window is None else (int(window),) * config.num_layers
    return replace(config, family="mistral", windows=windows)


def read_qwen2(hf: Mapping[str, Any]) -> GPTConfig:
    """Qwen 2 and 2.5: biases on query, key and value alone; upper layers may have a window."""
    config = read_llama({**hf, "attention_bias": False, "mlp_bias": False})
    return replace(config, family="qwen2", qkv_bias=True, windows=_qwen_windows(hf, config.num_layers))


def read_qwen3(hf: Mapping[str, Any]) -> GPTConfig:
    """Qwen 3: a norm on each head's query and key."""
    config = read_llama({**hf, "mlp_bias": False})
    return replace(config, family="qwen3", qk_norm=True, windows=_qwen_windows(hf, config.num_layers))


def read_nemotron(hf: Mapping[str, Any]) -> GPTConfig:
    """Nemotron 3 and 4, Minitron: LayerNorm around 1, squared ReLU without a gate, rotary on part of a head."""
    config = read_llama({"rms_norm_eps": hf.get("norm_eps", 1e-5), **hf})
    return replace(config, family="nemotron", norm="layer_1p", gated_mlp=False)


def _qwen_windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer; () when no layer has one. Rule: transformers `Qwen2Config.__post_init__`."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    if window is None:
        return ()
    first = int(hf.get("max_window_layers", 28))
    kinds = hf.get("layer_types") or [_LAYER_TYPES[i >= first] for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= set(_LAYER_TYPES):
        raise CheckpointError(
            f"config.json: layer_types {kinds!r} must name one of {', '.join(_LAYER_TYPES)} for each of "
            f"{num_layers} layers"
        )
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def llama_mappings(config: GPTConfig) -> list[TensorMapping]:
    """The tensors of the whole family."""
    norms = ("weight", "bias") if config.norm != "rms" else ("weight",)
    table = [TensorMapping("model.embed_tokens.weight", "embedding.weight")]
    table += [TensorMapping(f"model.norm.{tensor}", f"norm.{tensor}") for tensor in norms]
    if not config.tied_embeddings:
        table.append(TensorMapping("lm_head.weight", "head.weight"))
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        for tensor in norms:
            table.append(TensorMapping(f"{theirs}input_layernorm.{tensor}", f"{ours}attention_norm.{tensor}"))
            table.append(TensorMapping(f"{theirs}post_attention_layernorm.{tensor}", f"{ours}mlp_norm.{tensor}"))
        if config.qk_norm:
            for part in "qk":
                table.append(
                    TensorMapping(f"{theirs}self_attn.{part}_norm.weight", f"{ours}attention.{part}_norm.weight")
                )
        table += _linear_mappings(config, theirs, ours)
    return table


def _linear_mappings(config: GPTConfig, theirs: str, ours: str) -> list[TensorMapping]:
    linears = [("self_attn." + p + "_proj", "attention.qkv", p, config.qkv_bias) for p in "qkv"]
    linears.append(("self_attn.o_proj", "attention.out", "", config.out_bias))
    # Without a gate the linear is one module of the checkpoint: no part of it has a name of its own.
    inner = [("gate", "gate"), ("up", "up")] if config.gated_mlp else [("up", "")]
    linears += [(f"mlp.{p}_proj", "mlp.up", part, config.mlp_bias) for p, part in inner]
    linears.append(("mlp.down_proj", "mlp.down", "", config.mlp_bias))
    return [
        TensorMapping(f"{theirs}{their_linear}.{tensor}", f"{ours}{our_linear}.{tensor}", part)
        for their_linear, our_linear, part, has_bias in linears
        for tensor in (("weight", "bias") if has_bias else ("weight",))
    ]
