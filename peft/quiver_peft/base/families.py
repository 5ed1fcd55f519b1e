"""The families of GPT checkpoints that are read, by their `model_type`. Another family costs one entry here."""

from quiver_peft.base.family import Family
from quiver_peft.base.family_gpt2 import gpt2_renames, read_gpt2
from quiver_peft.base.family_llama import (
    llama_renames,
    read_llama,
    read_mistral,
    read_nemotron,
    read_qwen2,
    read_qwen3,
)

_INV_FREQ = (".rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    "llama": Family(read_llama, llama_renames, "model.", _INV_FREQ),
    "mistral": Family(read_mistral, llama_renames, "model.", _INV_FREQ),
    "qwen2": Family(read_qwen2, llama_renames, "model.", _INV_FREQ),
    "qwen3": Family(read_qwen3, llama_renames, "model.", _INV_FREQ),
    "nemotron": Family(read_nemotron, llama_renames, "model.", _INV_FREQ),
    "gpt2": Family(read_gpt2, gpt2_renames, "transformer.", (".attn.bias", ".attn.masked_bias")),
}
