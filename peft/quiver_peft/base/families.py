"""The supported checkpoint families by `model_type`. A new family is one entry here."""

from typing import Any

from quiver_peft.base.config import GPTConfig, T5Config
from quiver_peft.base.family import Family
from quiver_peft.base.family_gpt2 import gpt2_mappings, read_gpt2
from quiver_peft.base.family_llama import (
    llama_mappings,
    read_llama,
    read_mistral,
    read_nemotron,
    read_qwen2,
    read_qwen3,
)
from quiver_peft.base.family_t5 import read_mt5, read_t5, t5_mappings

_INV_FREQ = (".rotary_emb.inv_freq",)

GPT_FAMILIES: dict[str, Family[GPTConfig]] = {
    "llama": Family(read_llama, llama_mappings, "model.", _INV_FREQ),
    "mistral": Family(read_mistral, llama_mappings, "model.", _INV_FREQ),
    "qwen2": Family(read_qwen2, llama_mappings, "model.", _INV_FREQ),
    "qwen3": Family(read_qwen3, llama_mappings, "model.", _INV_FREQ),
    "nemotron": Family(read_nemotron, llama_mappings, "model.", _INV_FREQ),
    "gpt2": Family(read_gpt2, gpt2_mappings, "transformer.", (".attn.bias", ".attn.masked_bias")),
}

_EMBEDDED_TWICE = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Cross-attention has no relative positions; the first checkpoints stored some all the same.
_UNUSED_BIAS = (".EncDecAttention.relative_attention_bias.weight",)

T5_FAMILIES: dict[str, Family[T5Config]] = {
    "t5": Family(read_t5, t5_mappings, "", _EMBEDDED_TWICE + _UNUSED_BIAS),
    "mt5": Family(read_mt5, t5_mappings, "", _EMBEDDED_TWICE + _UNUSED_BIAS),
}

FAMILIES: dict[str, Family[Any]] = {**GPT_FAMILIES, **T5_FAMILIES}
