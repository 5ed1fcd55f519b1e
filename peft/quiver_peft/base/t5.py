"""`T5Base`: an encoder-decoder transformer (T5 1.0, 1.1, Flan, mT5)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

from torch import Tensor, nn

from quiver_peft.base.attention import Attend
from quiver_peft.base.base import Base
from quiver_peft.base.checkpoint import has_head
from quiver_peft.base.config import T5Config
from quiver_peft.base.families import T5_FAMILIES
from quiver_peft.base.layers import MLP, Attention, Embedding, make_norm
from quiver_peft.base.sites import NO_ADAPTERS, Linear, Seam, Site
from quiver_peft.base.t5_attention import RelativeBias, Sources
from quiver_peft.kernels.elementwise import add


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's output."""

    def __init__(self, config: T5Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.site = Site.in_layer(layer, "cross_attention", "decoder")
        size = config.num_heads * config.head_dim
        self.q = Linear(self._part("q"), config.hidden_size, {"q": size}, bias=False)
        self.kv = Linear(self._part("kv"), config.hidden_size, {"k": size, "v": size}, bias=False)
        self.out = Linear(self._part("out"), size, {"out": config.hidden_size}, bias=False)

    def _part(self, name: str) -> Site:
        return Site.in_layer(self.layer, f"cross_attention.{name}", "decoder")

    def project_encoder(self, source: Tensor, sources: Sources, seam: Seam) -> None:
        """Projects the encoder's output to keys and values and stores them in `sources`. source: [*, D]."""
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv.split(seam.linear(self.kv, source)))
        sources.store(self.layer, k, v)

    def forward(self, x: Tensor, sources: Sources, seam: Seam) -> Tensor:
        """x: [*, D] -> [*, D]."""
        q = seam.linear(self.q, x).unflatten(-1, (-1, self.head_dim))
        return seam.linear(self.out, sources(self.layer, q).flatten(-2))


class EncoderBlock(nn.Module):
    """One pre-norm layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: T5Config, layer: int, stack: Literal["encoder", "decoder"] = "encoder") -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer, stack)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, layer, stack)

    def forward(self, h: Tensor, attend: Attend, seam: Seam) -> Tensor:
        """h: [*, D] -> [*, D]."""
        return self.feed_forward(self.attend(h, attend, seam), seam)

    def attend(self, h: Tensor, attend: Attend, seam: Seam) -> Tensor:
        """h: [*, D] -> [*, D]."""
        out = self.attention(self.attention_norm(h), None, attend, seam)
        return add(h, seam.sublayer(self.attention.site, out, h))

    def feed_forward(self, h: Tensor, seam: Seam) -> Tensor:
        """h: [*, D] -> [*, D]."""
        out = self.mlp(self.mlp_norm(h), seam)
        return add(h, seam.sublayer(self.mlp.site, out, h))

    def sublayers(self) -> list[Site]:
        return [self.attention.site, self.mlp.site]


class DecoderBlock(EncoderBlock):
    """An encoder layer with cross-attention between self-attention and feed-forward."""

    def __init__(self, config: T5Config, layer: int) -> None:
        super().__init__(config, layer, "decoder")
        self.cross_attention_norm = make_norm(config)
        self.cross_attention = CrossAttention(config, layer)

    def forward(self, h: Tensor, attend: Attend, sources: Sources, seam: Seam) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """h: [*, D] -> [*, D]."""
        return self.feed_forward(self.attend_to_source(self.attend(h, attend, seam), sources, seam), seam)

    def attend_to_source(self, h: Tensor, sources: Sources, seam: Seam) -> Tensor:
        """h: [*, D] -> [*, D]."""
        out = self.cross_attention(self.cross_attention_norm(h), sources, seam)
        return add(h, seam.sublayer(self.cross_attention.site, out, h))

    def sublayers(self) -> list[Site]:
        return [self.attention.site, self.cross_attention.site, self.mlp.site]


class T5Stack(nn.Module):
    """Encoder or decoder: its layers, the relative bias that they share, and the final norm."""

    def __init__(self, config: T5Config, blocks: list[EncoderBlock] | list[DecoderBlock], bidirectional: bool) -> None:
        super().__init__()
        self.bias = RelativeBias(config.num_heads, config.num_buckets, config.max_distance, bidirectional=bidirectional)
        self.blocks = blocks
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(config)


class T5Base(Base):
    """An encoder-decoder transformer with relative positions.

    A request takes three calls: `encode` the source, `precompute_cross_kv` from the result into `Sources`, then
    `forward` for each decoder step.
    """

    families = T5_FAMILIES
    hf_task_type = "SEQ_2_SEQ_LM"

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self._config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self._encoder_blocks = [EncoderBlock(config, layer) for layer in range(config.num_encoder_layers)]
        self._decoder_blocks = [DecoderBlock(config, layer) for layer in range(config.num_layers)]
        self.encoder = T5Stack(config, self._encoder_blocks, bidirectional=True)
        self.decoder = T5Stack(config, self._decoder_blocks, bidirectional=False)
        blocks = [*self._encoder_blocks, *self._decoder_blocks]
        self.sublayers = [site for block in blocks for site in block.sublayers()]
        self.head = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for embedding in (self.embedding, self.head):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    @property
    def config(self) -> T5Config:
        return self._config

    @classmethod
    def _construct(cls, config: T5Config, folder: Path) -> Self:
        # Only the checkpoint tells whether the head is tied: transformers 5 writes "tied" in either case.
        return cls(replace(config, tied_embeddings=not has_head(folder)))

    def encode(self, tokens: Tensor, attend: Attend, seam: Seam = NO_ADAPTERS) -> Tensor:
        """The encoder's output. tokens: [*] int64 -> [*, D]."""
        h = self.parallel_hooks.scatter_tokens(seam.embed(Site.embedding("encoder"), tokens, self.embedding))
        for block in self._encoder_blocks:
            h = self.layer(partial(block, attend=attend, seam=seam), h)
        return self.encoder.norm(h)

    def precompute_cross_kv(self, encoded: Tensor, sources: Sources, seam: Seam = NO_ADAPTERS) -> None:
        """Stores the cross-attention keys and values of every decoder layer in `sources`. encoded: [*, D]."""
        for block in self._decoder_blocks:
            block.cross_attention.project_encoder(encoded, sources, seam)

    def forward(self, tokens: Tensor, attend: Attend, sources: Sources, seam: Seam = NO_ADAPTERS) -> Tensor:
        """Final hidden states of the decoder. tokens: [*] int64, the start token first -> [*, D]."""
        h = self.parallel_hooks.scatter_tokens(seam.embed(Site.embedding("decoder"), tokens, self.embedding))
        for block in self._decoder_blocks:
            h = self.layer(partial(block, attend=attend, sources=sources, seam=seam), h)
        return self.parallel_hooks.gather_tokens(self.decoder.norm(h))

    def scale_hidden(self, hidden: Tensor) -> Tensor:
        """Multiplies by hidden_size ** -0.5 in T5 1.0, whose tied head expects it. hidden: [*, D] -> [*, D]."""
        return hidden * self.config.hidden_size**-0.5 if self.config.scaled_head else hidden
