"""Prefix tuning (Li & Liang 2021): learned keys and values that every layer sees before those of the sequence.

In an encoder-decoder: every layer of the decoder, in its self-attention.

Shapes: n virtual tokens, L layers, G key-value heads, E head size. A row is laid out as Hugging Face PEFT's,
[2 · layer + (0: keys, 1: values)][G][E]; keys are used as they are, without rotary positions.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from quiver_peft.adapters.methods.method import Method
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.adapters.methods.virtual_tokens import require_room, require_virtual_tokens
from quiver_peft.base.base import Base
from quiver_peft.base.config import BaseConfig, T5Config
from quiver_peft.errors import AdapterError


@dataclass(frozen=True)
class PrefixPEFTConfig:
    """What to train. projection: learn the rows through a network of encoder_hidden_size features (None: G · E)."""

    virtual_tokens: int = 20
    projection: bool = False
    encoder_hidden_size: int | None = None

    def __post_init__(self) -> None:
        require_virtual_tokens("prefix tuning", self.virtual_tokens)
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise AdapterError(f"prefix tuning: encoder_hidden_size must be at least 1, not {self.encoder_hidden_size}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "prefix", **asdict(self)}


@dataclass(frozen=True)
class PrefixWeights:
    """A prefix on the host, fp32. keys, values: [L, n, G, E], in the order of the rows; see `to_layer_pairs`."""

    keys: Tensor
    values: Tensor
    pairs: tuple[int, ...]

    @classmethod
    def from_rows(cls, rows: Tensor, config: BaseConfig) -> Self:
        """rows: [n, 2 · L · G · E]."""
        shape = (rows.shape[0], config.num_layers, 2, config.num_kv_heads, config.head_dim)
        keys, values = rows.reshape(shape).permute(2, 1, 0, 3, 4)
        return cls(keys.contiguous(), values.contiguous(), tuple(to_layer_pairs(config)))

    def to_rows(self) -> Tensor:
        """[n, 2 · L · G · E]."""
        return torch.stack((self.keys, self.values)).permute(2, 1, 0, 3, 4).flatten(1).contiguous()


def to_layer_pairs(config: BaseConfig) -> list[int]:
    """Which pair of keys and values of a row each layer takes.

    An encoder-decoder's layers take every second one, round and round, as Hugging Face PEFT's do (0.21,
    `PeftModel.get_prompt` doubles the rows and deals them out in fours): with an even number of layers half of the
    pairs serves two layers each, and half none. Another rule would make other models of the same files.
    """
    num_layers = config.num_layers
    stride = 2 if isinstance(config, T5Config) else 1
    return [layer * stride % num_layers for layer in range(num_layers)]


class PrefixRows(nn.Module):
    """The rows themselves, trainable."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(rows.clone())

    def forward(self) -> Tensor:
        """[n, 2 · L · G · E]."""
        return self.embedding


class PrefixEncoder(nn.Module):
    """Rows made by two linears with a tanh between (Hugging Face PEFT `PrefixEncoder`)."""

    def __init__(self, num_tokens: int, input_size: int, encoder_hidden_size: int, row_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, input_size))
        self.transform = nn.Sequential(
            nn.Linear(input_size, encoder_hidden_size), nn.Tanh(), nn.Linear(encoder_hidden_size, row_size)
        )

    def forward(self) -> Tensor:
        """[n, 2 · L · G · E]."""
        return self.transform(self.embedding)


class PrefixModule(Method):
    """A trainable prefix. Like soft prompts it changes the base's answers from birth."""

    name = "prefix"
    virtual_stack = "decoder"

    def __init__(self, config: PrefixPEFTConfig, base_config: BaseConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.num_virtual_tokens = config.virtual_tokens
        self._base_config = base_config

    @classmethod
    def create(cls, base: Base, config: PrefixPEFTConfig) -> Self:
        """A fresh prefix of small numbers. Raises AdapterError when it leaves no room for real tokens."""
        require_room(base, config.virtual_tokens)
        kv_size = base.config.num_kv_heads * base.config.head_dim
        row_size = 2 * base.config.num_layers * kv_size
        if config.projection:
            inner = config.encoder_hidden_size or kv_size
            return cls(config, base.config, PrefixEncoder(config.virtual_tokens, kv_size, inner, row_size))
        # Small: a prefix of unit size would drown the sequence's own keys on the first step.
        return cls(config, base.config, PrefixRows(0.02 * torch.randn(config.virtual_tokens, row_size)))

    @classmethod
    def from_weights(cls, config: PrefixPEFTConfig, weights: PrefixWeights, base_config: BaseConfig) -> Self:
        """The trainable form of a prefix read from disk: the rows themselves."""
        return cls(config, base_config, PrefixRows(weights.to_rows()))

    def weights(self) -> PrefixWeights:
        """A detached fp32 copy on the host."""
        with torch.no_grad():
            return PrefixWeights.from_rows(to_host_fp32(self.encoder()), self._base_config)

    def virtual_key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, both [n, G, E]."""
        rows: Tensor = self.encoder()
        config = self._base_config
        size = config.num_kv_heads * config.head_dim
        pair = to_layer_pairs(config)[layer]
        keys, values = (
            rows[:, 2 * pair * size : 2 * (pair + 1) * size]
            .unflatten(1, (2, config.num_kv_heads, config.head_dim))
            .unbind(1)
        )
        return keys, values
