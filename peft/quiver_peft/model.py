"""`GPT` and `T5`: a base with one trainable adapter. The library's entry point."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiver_peft.adapters.formats.adapter_folder import read_adapter, save_adapter
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.base.base import Base
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.sites import NO_ADAPTERS, Seam, StackName
from quiver_peft.base.t5 import T5Base
from quiver_peft.base.t5_attention import BiasedAttention, WholeSources
from quiver_peft.errors import AdapterError

BaseT = TypeVar("BaseT", bound=Base)


class Model(nn.Module, Generic[BaseT]):
    """A base that can be fine-tuned as a whole, or frozen with an adapter (API of NeMo's PEFT guide).

    base: the definition and its weights. adapter: None until `add_adapter` or `load_adapters`.
    """

    def __init__(self, base: BaseT) -> None:
        super().__init__()
        self.base = base
        self.adapter: TrainableAdapter | None = None

    @property
    def seam(self) -> Seam:
        """The adapter, or `NO_ADAPTERS`."""
        return NO_ADAPTERS if self.adapter is None else self.adapter

    def num_virtual_in(self, stack: StackName) -> int:
        """Positions that the adapter takes before every sequence of a stack ("": the only one of a GPT)."""
        return 0 if self.adapter is None else self.adapter.num_virtual_in(stack)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a prompt and its answer together; None: relative positions, limited by memory only."""
        limit = self.base.config.max_positions
        return None if limit is None else limit - self.num_virtual_in("")

    def add_adapter(self, configs: PEFTConfig | Sequence[PEFTConfig]) -> None:
        """Freeze the base and add a new adapter of one or several methods.

        The model's answers do not change yet, soft prompts excepted.

        Raises AdapterError when there is an adapter already or a configuration does not fit the base.
        """
        if self.adapter is not None:
            raise AdapterError("this model has an adapter already; load the base again to start another one")
        self._set(TrainableAdapter.create(self.base, [configs] if isinstance(configs, PEFTConfig) else configs))

    def load_adapters(self, folder: str | Path) -> None:
        """Freeze the base and add a stored adapter, with its configuration.

        folder: what `read_adapter` reads; a NeMo 1.x archive or an AdapterHub pickle is named by the file itself.

        Raises AdapterError or BaseMismatchError; the model is then as it was.
        """
        self._set(TrainableAdapter.from_weights(self.base, read_adapter(folder, self.base)))

    def _set(self, adapter: TrainableAdapter) -> None:
        self.base.requires_grad_(False)
        reference = self.base.embedding.weight
        # Adapters stay in fp32 beside a half-precision base, as Hugging Face PEFT keeps them.
        self.adapter = adapter.to(reference.device)
        self.adapter.train(self.training)

    def freeze(self) -> None:
        """Nothing is trainable any more, and dropout is off: the state to predict in."""
        self.requires_grad_(False)
        self.eval()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters for the optimizer: the adapter's, or all of the base's without an adapter."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def save_adapter(
        self,
        folder: str | Path,
        *,
        base_name: str = "",
        tokenizer_digest: str = "",
        training: Mapping[str, Any] | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> str:
        """Write the adapter alone, atomically, and return its revision (see `save_adapter` of the artefact).

        Raises AdapterError without an adapter.
        """
        if self.adapter is None:
            raise AdapterError("this model has no adapter to save; call add_adapter or load_adapters first")
        return save_adapter(
            folder,
            self.base,
            self.adapter,
            base_name=base_name,
            tokenizer_digest=tokenizer_digest,
            training=training,
            extra_files=extra_files,
        )


class GPT(Model[GPTBase]):
    """A decoder-only model: it continues a sequence."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Read a Hugging Face folder. Raises CheckpointError."""
        return cls(GPTBase.from_pretrained(folder, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits of whole sequences, padded on the right if at all. tokens: [B, S] -> [B, S, V]."""
        return self.base.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states, for callers that need logits of a few rows only. tokens: [B, S] -> [B, S, D].

        An adapter's virtual tokens stand before every row; their own states are left out.
        """
        num_virtual = self.num_virtual_in("")
        return self.base(F.pad(tokens, (num_virtual, 0)), seam=self.seam)[:, num_virtual:]


class T5(Model[T5Base]):
    """An encoder-decoder model: it reads a source and writes a target."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Read a Hugging Face folder. Raises CheckpointError."""
        return cls(T5Base.from_pretrained(folder, dtype=dtype, device=device))

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Next-token logits of targets; see `hidden`. -> [B, N, V]."""
        return self.base.logits(self.hidden(source, target, source_lengths))

    def hidden(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Final hidden states of the decoder. source: [B, S], target: [B, N], start token first -> [B, N, D].

        source_lengths: [B], real tokens of each source, padded on the right; None: all of them.
        An adapter's virtual tokens stand before every source (prompts) or target (prefixes); the states of these are
        left out.
        """
        num_prompt, num_prefix = self.num_virtual_in("encoder"), self.num_virtual_in("decoder")
        if source_lengths is None:
            source_lengths = torch.full((source.shape[0],), source.shape[1], device=source.device)
        lengths = source_lengths + num_prompt
        base, seam = self.base, self.seam
        encoded = base.encode(F.pad(source, (num_prompt, 0)), BiasedAttention(base.encoder.bias, lengths), seam)
        sources = WholeSources(lengths)
        base.precompute_cross_kv(encoded, sources, seam)
        attend = BiasedAttention(base.decoder.bias)
        return base(F.pad(target, (num_prefix, 0)), attend, sources, seam)[:, num_prefix:]


AnyModel = GPT | T5


def model_of(base: GPTBase | T5Base) -> AnyModel:
    """The model around a base: a `T5` around a T5Base, a `GPT` around a GPTBase; without an adapter."""
    return T5(base) if isinstance(base, T5Base) else GPT(base)


def load_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AnyModel:
    """A `T5` or a `GPT`, whichever the folder holds. Raises CheckpointError."""
    return model_of(load_base(folder, dtype=dtype, device=device))
