"""The families of GPT checkpoints: for each a mapping of its config.json and a table of its tensor names.

Another family costs one entry here. The same table reads a checkpoint, writes one, and tells which site and part a
module name means (for adapters made elsewhere).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quiver_peft.base.config import GPTConfig, read_rope, token_ids
from quiver_peft.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """One checkpoint tensor: its name there, our parameter, and the part of the parameter's rows it fills.

    part: "" means all rows. transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    """

    theirs: str
    ours: str
    part: str = ""
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    ignored: name endings of buffers in old checkpoints that follow from the configuration.
    prefix: what the language-model class puts before the names; checkpoints of the bare model lack it.
    """

    read_config: Callable[[Mapping[str, Any]], GPTConfig]
    renames: Callable[[GPTConfig], list[Rename]]
    prefix: str
    ignored: tuple[str, ...]


def _choose(hf: Mapping[str, Any], key: str, names: Mapping[str, Any]) -> Any:
    value = hf[key]
    if value not in names:
        raise CheckpointError(f"config.json: {key} {value!r} is not supported; known: {', '.join(names)}")
    return names[value]


def _require(hf: Mapping[str, Any], key: str, expected: object) -> None:
    if hf.get(key, expected) != expected:
        raise CheckpointError(f"config.json: {key} = {hf[key]!r} is not supported; only {expected!r} is")


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _read_llama(hf: Mapping[str, Any]) -> GPTConfig:
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
        activation=_choose(hf, "hidden_act", _ACTIVATIONS),
        gated_mlp=True,
        qkv_bias=bool(hf.get("attention_bias", False)),
        out_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope=read_rope(hf, head_dim),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def _llama_renames(config: GPTConfig) -> list[Rename]:
    table = [
        Rename("model.embed_tokens.weight", "embedding.weight"),
        Rename("model.norm.weight", "norm.weight"),
    ]
    if not config.tied_embeddings:
        table.append(Rename("lm_head.weight", "head.weight"))
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        table += [
            Rename(theirs + "input_layernorm.weight", ours + "attention_norm.weight"),
            Rename(theirs + "post_attention_layernorm.weight", ours + "mlp_norm.weight"),
        ]
        linears = [("self_attn." + p + "_proj", "attention.qkv", p, config.qkv_bias) for p in "qkv"]
        linears.append(("self_attn.o_proj", "attention.out", "", config.out_bias))
        linears += [(f"mlp.{p}_proj", "mlp.up", p, config.mlp_bias) for p in ("gate", "up")]
        linears.append(("mlp.down_proj", "mlp.down", "", config.mlp_bias))
        for their_linear, our_linear, part, has_bias in linears:
            for tensor in ("weight", "bias") if has_bias else ("weight",):
                table.append(Rename(f"{theirs}{their_linear}.{tensor}", f"{ours}{our_linear}.{tensor}", part))
    return table


def _read_gpt2(hf: Mapping[str, Any]) -> GPTConfig:
    for key, expected in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _require(hf, key, expected)
    hidden, heads = int(hf["n_embd"]), int(hf["n_head"])
    return GPTConfig(
        family="gpt2",
        vocab_size=int(hf["vocab_size"]),
        hidden_size=hidden,
        num_layers=int(hf["n_layer"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=int(hf.get("n_inner") or 4 * hidden),
        max_positions=int(hf["n_positions"]),
        norm="layer",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        activation=_choose(hf, "activation_function", _ACTIVATIONS),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(hf.get("tie_word_embeddings", True)),
        rope=None,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def _gpt2_renames(config: GPTConfig) -> list[Rename]:
    table = [
        Rename("transformer.wte.weight", "embedding.weight"),
        Rename("transformer.wpe.weight", "position_embedding.weight"),
    ]
    norms = [("transformer.ln_f", "norm")]
    if not config.tied_embeddings:
        table.append(Rename("lm_head.weight", "head.weight"))
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        norms += [(theirs + "ln_1", ours + "attention_norm"), (theirs + "ln_2", ours + "mlp_norm")]
        for their_linear, our_linear in (
            ("attn.c_attn", "attention.qkv"),
            ("attn.c_proj", "attention.out"),
            ("mlp.c_fc", "mlp.up"),
            ("mlp.c_proj", "mlp.down"),
        ):
            table.append(Rename(f"{theirs}{their_linear}.weight", f"{ours}{our_linear}.weight", transposed=True))
            table.append(Rename(f"{theirs}{their_linear}.bias", f"{ours}{our_linear}.bias"))
    for their_norm, our_norm in norms:
        table += [Rename(f"{their_norm}.{t}", f"{our_norm}.{t}") for t in ("weight", "bias")]
    return table


FAMILIES: dict[str, Family] = {
    "llama": Family(_read_llama, _llama_renames, "model.", (".rotary_emb.inv_freq",)),
    "gpt2": Family(_read_gpt2, _gpt2_renames, "transformer.", (".attn.bias", ".attn.masked_bias")),
}
