"""T5 checkpoints: 1.0, 1.1 and Flan, and mT5, which differ in the feed-forward and in the head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quiver_peft.base.config import T5Config, token_ids
from quiver_peft.base.family import ACTIVATIONS, TensorMapping, choose, require


def read_t5(hf: Mapping[str, Any]) -> T5Config:
    """T5 1.0 (ReLU, tied head, scaled before it) and 1.1 or Flan (gated GELU, a head of its own, unscaled)."""
    require(hf, "is_encoder_decoder", True)
    heads, num_layers = int(hf["num_heads"]), int(hf["num_layers"])
    activation = str(hf.get("feed_forward_proj", "relu"))
    gated = activation.startswith("gated-")
    # transformers 5 ties always and says apart whether to scale; before, an untied head was the sign of T5 1.1.
    tied = hf.get("tie_word_embeddings", True) is not False
    start = hf.get("decoder_start_token_id")
    start = hf.get("pad_token_id") if start is None else start
    return T5Config(
        family="t5",
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["d_model"]),
        num_layers=int(hf.get("num_decoder_layers") or num_layers),
        num_encoder_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=int(hf["d_kv"]),
        ffn_size=int(hf["d_ff"]),
        max_positions=None,
        norm="rms",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-6)),
        activation=_activation(activation),
        gated_mlp=gated,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_embeddings=tied,
        num_buckets=int(hf.get("relative_attention_num_buckets", 32)),
        max_distance=int(hf.get("relative_attention_max_distance", 128)),
        scaled_head=bool(hf.get("scale_decoder_outputs", tied)),
        start_token_id=int(start or 0),
        eos_token_ids=token_ids(hf.get("eos_token_id", 1)),
    )


def read_mt5(hf: Mapping[str, Any]) -> T5Config:
    """mT5: T5 1.1 by another name; its head is never scaled, whatever the tying says."""
    config = read_t5({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu", **hf})
    return replace(config, family="mt5", scaled_head=False)


def _activation(name: str) -> Any:
    # "gated-gelu" means the tanh form, "gelu" the exact one (transformers `T5Config.__post_init__`).
    kind = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    return choose({"feed_forward_proj": kind}, "feed_forward_proj", ACTIVATIONS)


def t5_mappings(config: T5Config) -> list[TensorMapping]:
    """The tensors of the whole family."""
    table = [TensorMapping("shared.weight", "embedding.weight")]
    if not config.tied_embeddings:
        table.append(TensorMapping("lm_head.weight", "head.weight"))
    for stack, num_layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_layers)):
        table.append(TensorMapping(f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight"))
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table.append(TensorMapping(bias, f"{stack}.bias.weight"))
        for i in range(num_layers):
            table += _layer_mappings(config, stack, i)
    return table


def _layer_mappings(config: T5Config, stack: str, i: int) -> list[TensorMapping]:
    theirs, ours = f"{stack}.block.{i}.layer.", f"{stack}.layers.{i}."
    cross = [("EncDecAttention", "cross_attention")] if stack == "decoder" else []
    names = [("SelfAttention", "attention"), *cross, ("DenseReluDense", "mlp")]
    table: list[TensorMapping] = []
    for number, (their_part, our_part) in enumerate(names):
        table.append(TensorMapping(f"{theirs}{number}.layer_norm.weight", f"{ours}{our_part}_norm.weight"))
        for their_linear, our_linear, part in _linears(config, our_part):
            table.append(
                TensorMapping(
                    f"{theirs}{number}.{their_part}.{their_linear}.weight", f"{ours}{our_linear}.weight", part
                )
            )
    return table


def _linears(config: T5Config, part: str) -> list[tuple[str, str, str]]:
    if part == "attention":
        return [*((p, "attention.qkv", p) for p in "qkv"), ("o", "attention.out", "")]
    if part == "cross_attention":
        keys_values = [(p, "cross_attention.kv", p) for p in "kv"]
        return [("q", "cross_attention.q", ""), *keys_values, ("o", "cross_attention.out", "")]
    inner = [("wi_0", "mlp.up", "gate"), ("wi_1", "mlp.up", "up")] if config.gated_mlp else [("wi", "mlp.up", "")]
    return [*inner, ("wo", "mlp.down", "")]
