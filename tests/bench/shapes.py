"""The models that are measured: their sizes, and what reading and multiplying them costs. Plain Python, no torch."""

from dataclasses import dataclass
from typing import Literal

RANK = 16
FLOAT_BYTES = 4  # everything is measured in float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a base, as its config.json names them. T5: num_layers in the encoder, and as many in the decoder."""

    name: str
    family: Literal["llama", "qwen2", "t5"]
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def _linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linears, of each of the two kinds of layers in a T5."""
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, ffn = self.hidden_size, self.ffn_size
        attention = {"q": (hidden, inner), "k": (hidden, kv), "v": (hidden, kv), "o": (inner, hidden)}
        up = {"up": (hidden, ffn), "down": (ffn, hidden)}
        return attention | up | ({} if self.family == "t5" else {"gate": (hidden, ffn)})

    def _per_layer(self, rank: int | None) -> tuple[int, int, int]:
        """Parameters of a layer's linears (rank: of a LoRA on them): all, attention's query and output, key and value.

        The last two are what a T5's cross-attention has more.
        """
        count = {name: (i * o if rank is None else rank * (i + o)) for name, (i, o) in self._linears.items()}
        return sum(count.values()), count["q"] + count["o"], count["k"] + count["v"]

    def prompt_params(self, rank: int | None = None) -> int:
        """Parameters that each prompt token meets. A T5: its encoder, and the decoder's keys and values of sources."""
        layer, _, key_value = self._per_layer(rank)
        return self.num_layers * (layer + (key_value if self.family == "t5" else 0))

    def token_params(self, rank: int | None = None) -> int:
        """Parameters that each generated token meets, the head among them."""
        layer, query_out, _ = self._per_layer(rank)
        head = 0 if rank else self.vocab_size * self.hidden_size
        return self.num_layers * (layer + (query_out if self.family == "t5" else 0)) + head

    @property
    def token_share(self) -> float:
        """How much of an adapter's weights a generated token reads."""
        decoder = self.token_params(RANK)
        return decoder / (decoder + self.prompt_params(RANK)) if self.family == "t5" else 1.0

    @property
    def adapter_bytes(self) -> int:
        """A LoRA of rank 16 on all linears."""
        extra = self.prompt_params(RANK) if self.family == "t5" else 0
        return FLOAT_BYTES * (self.token_params(RANK) + extra)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers that generate; of a T5's source token the same."""
        return FLOAT_BYTES * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def attention_flops(self, context: int) -> int:
        """Scores and weighted sums of one new token over `context` tokens."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * context


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama60", "llama", 640, 1728, 12, 10, 5, 64, 8192),
        Shape("qwen05", "qwen2", 896, 4864, 24, 14, 2, 64, 32000),
        Shape("t5-60", "t5", 640, 1728, 6, 10, 10, 64, 8192),
        Shape("tiny", "llama", 64, 96, 2, 4, 2, 16, 512),  # for the harness's own tests
    )
}
