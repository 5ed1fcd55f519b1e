"""What makes P-Tuning's virtual tokens while training: a small network over learned inputs.

Shapes: n virtual tokens, I inputs of the encoder, D hidden size of the base.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NemoEncoder(nn.Module):
    """Two linears with a tanh-GELU between (NeMo 1.x `PromptEncoderAdapter`)."""

    def __init__(self, num_tokens: int, input_size: int, bottleneck: int, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(nn.init.normal_(torch.empty(num_tokens, input_size), std=init_std))
        self.first = nn.Linear(input_size, bottleneck)
        self.second = nn.Linear(bottleneck, hidden_size)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self) -> Tensor:
        """[n, D]."""
        return self.second(F.gelu(self.first(self.embedding), approximate="tanh"))


class MLPEncoder(nn.Module):
    """Three linears with ReLUs between (Hugging Face PEFT `PromptEncoder`, type MLP)."""

    def __init__(self, num_tokens: int, hidden_size: int, encoder_hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, hidden_size))
        self.mlp_head = nn.Sequential(
            nn.Linear(hidden_size, encoder_hidden_size),
            nn.ReLU(),
            nn.Linear(encoder_hidden_size, encoder_hidden_size),
            nn.ReLU(),
            nn.Linear(encoder_hidden_size, hidden_size),
        )

    def forward(self) -> Tensor:
        """[n, D]."""
        return self.mlp_head(self.embedding)


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM and two linears (Liu et al. 2021; Hugging Face PEFT `PromptEncoder`, type LSTM)."""

    def __init__(
        self, num_tokens: int, hidden_size: int, encoder_hidden_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, hidden_size))
        self.lstm_head = nn.LSTM(
            hidden_size, encoder_hidden_size, num_layers, dropout=dropout, bidirectional=True, batch_first=True
        )
        self.mlp_head = nn.Sequential(
            nn.Linear(2 * encoder_hidden_size, 2 * encoder_hidden_size),
            nn.ReLU(),
            nn.Linear(2 * encoder_hidden_size, hidden_size),
        )

    def forward(self) -> Tensor:
        """[n, D]."""
        states: Tensor = self.lstm_head(self.embedding[None])[0]
        return self.mlp_head(states)[0]
