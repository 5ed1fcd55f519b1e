"""`GPTBase`: a decoder-only transformer. Llama and its relatives and GPT-2 differ in its configuration only."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from quiver_peft.base.attention import Attend, CausalAttention
from quiver_peft.base.base import Base
from quiver_peft.base.config import GPTConfig
from quiver_peft.base.families import GPT_FAMILIES
from quiver_peft.base.layers import MLP, Attention, Embedding, Rotary, make_norm
from quiver_peft.base.sites import NO_ADAPTERS, Seam, Site
from quiver_peft.kernels.elementwise import add

_EMBEDDING = Site.embedding()


class Block(nn.Module):
    """One pre-norm layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, layer)

    def forward(self, h: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend, seam: Seam) -> Tensor:
        """h: [*, D] -> [*, D]."""
        out = self.attention(self.attention_norm(h), rotary, attend, seam)
        h = add(h, seam.sublayer(self.attention.site, out, h))
        out = self.mlp(self.mlp_norm(h), seam)
        return add(h, seam.sublayer(self.mlp.site, out, h))


class GPTBase(Base):
    """A decoder-only transformer: embedding, pre-norm layers, head."""

    families = GPT_FAMILIES
    hf_task_type = "CAUSAL_LM"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self._config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        learned = config.rope is None
        self.position_embedding = Embedding(config.max_positions, config.hidden_size) if learned else None
        self.rotary = None if config.rope is None else Rotary(config.rope)
        blocks = [Block(config, layer) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.sublayers = [part.site for block in blocks for part in (block.attention, block.mlp)]
        self.norm = make_norm(config)
        self.head = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for embedding in (self.embedding, self.position_embedding, self.head):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    @property
    def config(self) -> GPTConfig:
        return self._config

    @classmethod
    def _construct(cls, config: GPTConfig, folder: Path) -> Self:
        return cls(config)

    def _fill_computed(self) -> None:
        if self.config.rope is not None:
            self.rotary = Rotary(self.config.rope)

    def buffers_read(self) -> Iterator[Tensor]:
        yield from super().buffers_read()
        if self.rotary is not None:
            yield self.rotary.frequencies

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        seam: Seam = NO_ADAPTERS,
    ) -> Tensor:
        """Final hidden states. tokens, positions: [*] int64 -> [*, D].

        Without `positions` and `attend`, tokens are whole sequences [B, S] that start at position 0.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        attend = attend or CausalAttention(self.config.windows)
        h = seam.embed(_EMBEDDING, tokens, self.embedding)
        if self.position_embedding is not None:
            h = add(h, self.position_embedding(positions))
        rotary = None if self.rotary is None else self.rotary(positions, h.dtype)
        h = self.parallel_hooks.scatter_tokens(h)
        for block in self.layers:
            h = self.layer(partial(block, rotary=rotary, attend=attend, seam=seam), h)
        return self.parallel_hooks.gather_tokens(self.norm(h))
