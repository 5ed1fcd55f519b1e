"""Soft prompts: rows put before the prompt's embeddings.

P-Tuning (Liu et al. 2021) makes them by a small network while training, prompt tuning (Lester et al. 2021) learns them
directly; both end as a table.

Shapes: n virtual tokens, D hidden size.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quiver_peft.adapters.methods.method import Method
from quiver_peft.adapters.methods.prompt_encoder import LSTMEncoder, MLPEncoder, NemoEncoder
from quiver_peft.adapters.methods.tensors import to_host_fp32
from quiver_peft.adapters.methods.virtual_tokens import require_room, require_virtual_tokens
from quiver_peft.base.base import Base
from quiver_peft.errors import AdapterError


@dataclass(frozen=True)
class PtuningPEFTConfig:
    """P-Tuning. Names and defaults follow NeMo 1.x `PtuningPEFTConfig`.

    encoder: "nemo" (a network of embedding_dim inputs and bottleneck_dim hidden features, started at init_std), or
        "mlp" and "lstm", those of Hugging Face PEFT, with encoder_hidden_size features (None: as the base has).
    """

    virtual_tokens: int = 10
    bottleneck_dim: int = 1024
    embedding_dim: int = 1024
    init_std: float = 0.023
    encoder: Literal["nemo", "mlp", "lstm"] = "nemo"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        require_virtual_tokens("P-Tuning", self.virtual_tokens)
        for name in ("bottleneck_dim", "embedding_dim", "encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AdapterError(f"P-Tuning: {name} must be at least 1, not {value}")
        if not self.init_std > 0:
            raise AdapterError(f"P-Tuning: init_std must be above 0, not {self.init_std}")
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise AdapterError(f"P-Tuning: encoder_dropout must be in [0, 1), not {self.encoder_dropout}")
        if self.encoder not in ("nemo", "mlp", "lstm"):
            raise AdapterError(f"P-Tuning: encoder must be one of nemo, mlp, lstm, not {self.encoder!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "ptuning", **asdict(self)}


@dataclass(frozen=True)
class PromptTuningPEFTConfig:
    """Prompt tuning. init: rows start at embeddings of random words of the vocabulary, or at noise ("random")."""

    virtual_tokens: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"

    def __post_init__(self) -> None:
        require_virtual_tokens("prompt tuning", self.virtual_tokens)
        if self.init not in ("vocabulary", "random"):
            raise AdapterError(f"prompt tuning: init must be one of vocabulary, random, not {self.init!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": "prompt_tuning", **asdict(self)}


@dataclass(frozen=True)
class PromptWeights:
    """A soft prompt on the host. table: [n, D] fp32."""

    table: Tensor


class PromptTable(nn.Module):
    """The rows themselves, trainable."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(table.clone())

    def forward(self) -> Tensor:
        """[n, D]."""
        return self.embedding


class PromptModule(Method):
    """A trainable soft prompt. Unlike other methods it changes the base's answers from birth."""

    name = "ptuning"
    virtual_stack = "encoder"

    def __init__(self, config: PtuningPEFTConfig | PromptTuningPEFTConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.name = "ptuning" if isinstance(config, PtuningPEFTConfig) else "prompt_tuning"
        self.config = config
        self.encoder = encoder
        self.num_virtual_tokens = config.virtual_tokens

    @classmethod
    def create(cls, base: Base, config: PtuningPEFTConfig | PromptTuningPEFTConfig) -> Self:
        """A fresh prompt. Raises AdapterError when it leaves no room for real tokens."""
        require_room(base, config.virtual_tokens)
        hidden_size, n = base.config.hidden_size, config.virtual_tokens
        if isinstance(config, PromptTuningPEFTConfig):
            return cls(config, PromptTable(_first_rows(base, config)))
        if config.encoder == "nemo":
            dims = config.embedding_dim, config.bottleneck_dim, hidden_size
            return cls(config, NemoEncoder(n, *dims, config.init_std))
        inner = config.encoder_hidden_size or hidden_size
        if config.encoder == "mlp":
            return cls(config, MLPEncoder(n, hidden_size, inner))
        return cls(config, LSTMEncoder(n, hidden_size, inner, config.encoder_num_layers, config.encoder_dropout))

    @classmethod
    def from_weights(cls, config: PtuningPEFTConfig | PromptTuningPEFTConfig, weights: PromptWeights) -> Self:
        """The trainable form of a table read from disk: the table itself, whatever network made it."""
        return cls(config, PromptTable(weights.table))

    @property
    def needs_rng(self) -> bool:
        """For the dropout of an LSTM, while training."""
        config = self.config
        return self.training and isinstance(config, PtuningPEFTConfig) and config.encoder_dropout > 0

    def weights(self) -> PromptWeights:
        """The table, a detached fp32 copy on the host. Dropout must be off for what an encoder makes to be exact."""
        was_training = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            table = to_host_fp32(self.encoder())
        self.encoder.train(was_training)
        return PromptWeights(table)

    def virtual_embeddings(self) -> Tensor:
        """[n, D]."""
        return self.encoder()


def _first_rows(base: Base, config: PromptTuningPEFTConfig) -> Tensor:
    if config.init == "random":
        return torch.randn(config.virtual_tokens, base.config.hidden_size)
    ids = torch.randint(base.config.vocab_size, (config.virtual_tokens,))
    return to_host_fp32(base.embedding(ids.to(base.embedding.weight.device)))
