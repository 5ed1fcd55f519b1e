"""The decoder-only base, whole: embedding, layers, head. Llama-style and GPT-2 are choices of its configuration."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.base.attention import Attend, CausalAttention
from quiver_peft.base.checkpoint import fingerprint, load_checkpoint, read_config
from quiver_peft.base.config import GPTConfig
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.layers import MLP, Attention, Rotary, make_norm
from quiver_peft.base.sites import NO_ADAPTERS, Linear, Seam
from quiver_peft.errors import CheckpointError


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
        h = h + seam.sublayer(self.attention.site, out, h)
        out = self.mlp(self.mlp_norm(h), seam)
        return h + seam.sublayer(self.mlp.site, out, h)


class GPTBase(nn.Module):
    """A decoder-only transformer. It knows sites, not adapters: what acts there comes in as a `Seam`.

    fingerprint: identifies the checkpoint it was read from ("" when freshly initialised).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = ""
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.rope is None
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.rotary = None if config.rope is None else Rotary(config.rope)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for embedding in (self.embedding, self.position_embedding, self.head):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "GPTBase":
        """Read a Hugging Face folder (config.json and safetensors). Raises CheckpointError."""
        path = Path(folder)
        hf_config = read_config(path)
        family = FAMILIES[hf_config["model_type"]]
        try:
            config = family.read_config(hf_config)
        except KeyError as error:
            raise CheckpointError(f"{path / 'config.json'}: lacks the field {error}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path / 'config.json'}: a field is malformed: {error}") from None
        with torch.device("meta"):
            base = cls(config).to(dtype)
        base.to_empty(device=device)
        if config.rope is not None:
            base.rotary = Rotary(config.rope)
        load_checkpoint(base, path, family.renames(config))
        base.fingerprint = fingerprint(path)
        return base.eval()

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
        h = seam.embed(tokens, self.embedding)
        if self.position_embedding is not None:
            h = h + self.position_embedding(positions)
        rotary = None if self.rotary is None else self.rotary(positions, h.dtype)
        for block in self.layers:
            h = block(h, rotary, attend, seam)
        return self.norm(h)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [*, D] -> next-token logits [*, V]."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def linears(self) -> Iterator[Linear]:
        """Every linear with a site, in order of the layers."""
        for module in self.modules():
            if isinstance(module, Linear):
                yield module

    def checkpoint_linears(self) -> dict[str, tuple[Linear, str]]:
        """Checkpoint module (e.g. "model.layers.0.self_attn.q_proj") -> our linear and its part ("": all of it)."""
        linears = {linear.site.name + ".weight": linear for linear in self.linears()}
        return {
            rename.theirs.removesuffix(".weight"): (linears[rename.ours], rename.part)
            for rename in FAMILIES[self.config.family].renames(self.config)
            if rename.ours in linears
        }
