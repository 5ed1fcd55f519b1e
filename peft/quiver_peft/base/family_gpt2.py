"""GPT-2 checkpoints: learned positions, linears stored as Conv1D."""

from collections.abc import Mapping
from typing import Any

from quiver_peft.base.config import GPTConfig, token_ids
from quiver_peft.base.family import ACTIVATIONS, TensorMapping, choose, require


def read_gpt2(hf: Mapping[str, Any]) -> GPTConfig:
    for key, expected in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        require(hf, key, expected)
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
        activation=choose(hf, "activation_function", ACTIVATIONS),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(hf.get("tie_word_embeddings", True)),
        rope=None,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def gpt2_mappings(config: GPTConfig) -> list[TensorMapping]:
    table = [
        TensorMapping("transformer.wte.weight", "embedding.weight"),
        TensorMapping("transformer.wpe.weight", "position_embedding.weight"),
    ]
    norms = [("transformer.ln_f", "norm")]
    if not config.tied_embeddings:
        table.append(TensorMapping("lm_head.weight", "head.weight"))
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        norms += [(theirs + "ln_1", ours + "attention_norm"), (theirs + "ln_2", ours + "mlp_norm")]
        for their_linear, our_linear in (
            ("attn.c_attn", "attention.qkv"),
            ("attn.c_proj", "attention.out"),
            ("mlp.c_fc", "mlp.up"),
            ("mlp.c_proj", "mlp.down"),
        ):
            table.append(TensorMapping(f"{theirs}{their_linear}.weight", f"{ours}{our_linear}.weight", transposed=True))
            table.append(TensorMapping(f"{theirs}{their_linear}.bias", f"{ours}{our_linear}.bias"))
    for their_norm, our_norm in norms:
        table += [TensorMapping(f"{their_norm}.{t}", f"{our_norm}.{t}") for t in ("weight", "bias")]
    return table
