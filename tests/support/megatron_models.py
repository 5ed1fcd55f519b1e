"""Megatron-Core's own GPTModel and T5Model of a base's shapes, on a CPU: the oracle for its checkpoints."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from quiver_peft.base.config import BaseConfig, GPTConfig, T5Config

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def megatron_model(config: BaseConfig) -> Any:
    """Random weights, in evaluation mode; the mesh must have been started."""
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return (_t5(config) if isinstance(config, T5Config) else _gpt(config)).eval()


@torch.no_grad()
def megatron_logits(model: nn.Module, tokens: Tensor, target: Tensor | None) -> Tensor:
    """tokens: [B, S]; a T5's target: [B, N] -> [B, S or N, V]. True in a mask is what is not seen."""
    if target is None:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, _causal(tokens.shape[1]))
    seen = torch.zeros(len(tokens), 1, 1, tokens.shape[1], dtype=torch.bool)
    encoder = seen.expand(-1, -1, tokens.shape[1], -1)
    return model(tokens, target, encoder, _causal(target.shape[1]), seen.expand(-1, -1, target.shape[1], -1))


def _causal(length: int) -> Tensor:
    return torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)


def _config(config: BaseConfig, **more: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_size,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=config.gated_mlp,
        activation_func=_ACTIVATIONS[config.activation],
        add_bias_linear=config.mlp_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **more,
    )


def _gpt(config: BaseConfig) -> nn.Module:
    assert isinstance(config, GPTConfig)
    return GPTModel(
        _config(config),
        get_gpt_layer_local_spec(normalization="RMSNorm" if config.norm == "rms" else None),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_positions,
        position_embedding_type="learned_absolute" if config.rope is None else "rope",
        rotary_base=10000 if config.rope is None else int(config.rope.theta),
        share_embeddings_and_output_weights=config.tied_embeddings,
    )


def _t5(config: T5Config) -> nn.Module:
    # Their annotations are narrower than what they take.
    encoder: Any = encoder_model_with_local_spec()
    decoder: Any = decoder_model_with_local_spec()
    model: Any = T5Model
    norm: Any = WrappedTorchNorm
    for attention in (
        encoder.submodules.self_attention,
        decoder.submodules.self_attention,
        decoder.submodules.cross_attention,
    ):
        attention.submodules.core_attention = _BiasedAttention
    settings = _config(config, softmax_scale=1.0)
    encoder_settings = copy.deepcopy(settings)
    encoder_settings.num_layers = config.num_encoder_layers
    return model(
        settings,
        encoder_settings,
        TransformerBlockSubmodules([encoder] * config.num_encoder_layers, layer_norm=norm),
        TransformerBlockSubmodules([decoder] * config.num_layers, layer_norm=norm),
        vocab_size=config.vocab_size,
        max_sequence_length=64,
        position_embedding_type="relative",
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        share_embeddings_and_output_weights=config.tied_embeddings,
    )


class _BiasedAttention(nn.Module):
    """Megatron's own takes no relative positions without Transformer Engine; everything else of T5Model is theirs."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, attention_bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        """q, k, v: [S, B, H, E] -> [S, B, H · E]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        bias = torch.zeros(1, 1, q.shape[2], k.shape[2]) if attention_bias is None else attention_bias
        bias = bias.masked_fill(attention_mask, torch.finfo(q.dtype).min).expand(len(q), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self._scale)
        return out.permute(2, 0, 1, 3).flatten(2)
