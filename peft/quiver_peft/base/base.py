"""`Base`: what decoder-only and encoder-decoder bases share: named sites, loading from Hugging Face folders."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quiver_peft.base.checkpoint import ShardSlice, fingerprint, load_checkpoint, narrow_parameters, read_config
from quiver_peft.base.config import BaseConfig
from quiver_peft.base.families import FAMILIES
from quiver_peft.base.family import Family, TensorMapping
from quiver_peft.base.layers import Embedding
from quiver_peft.base.parallel_hooks import SINGLE_DEVICE, TensorParallelHooks
from quiver_peft.base.sites import Linear, Site
from quiver_peft.errors import CheckpointError
from quiver_peft.kernels.packed_linear import PackedWeight, packed_linear


class Base(nn.Module):
    """A transformer that knows sites but no adapters: adapters act through the `Seam` that `forward` is given.

    families: the checkpoint families that it can be read from, by `model_type`.
    hf_task_type: the `task_type` of Hugging Face PEFT for such a model.
    fingerprint: identifies the checkpoint it was read from ("" when freshly initialised).
    sublayers: the sites of its attention and feed-forward sub-layers, in order.
    head: None when the head is tied to the embedding.
    recomputes: activation checkpointing: layers are recomputed in the backward pass.
    parallel_hooks: token sharding, head and loss; `SINGLE_DEVICE` unless `quiver_peft.parallel` made the base.
    compute_dtype: of hidden states, keys and values, and served adapters; weights may be stored in another type.
    """

    families: ClassVar[Mapping[str, Family[Any]]]
    hf_task_type: ClassVar[str]
    embedding: Embedding
    head: nn.Linear | None
    sublayers: list[Site]

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = ""
        self.packed_head: PackedWeight | None = None
        self.parallel_hooks: TensorParallelHooks = SINGLE_DEVICE
        self.recomputes = False
        self.compute_dtype = torch.float32

    @property
    def config(self) -> BaseConfig:
        """Sizes and architecture choices."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Layers of the deepest stack."""
        return 1 + max(site.layer for site in self.sublayers)

    def layer(self, layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """Applies a layer, with activation checkpointing if `recomputes`. h: [*, D] -> [*, D]."""
        if self.recomputes and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, h, use_reentrant=False)
            return output
        return layer(h)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight, [V, D]; empty once it is packed, unless tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def project(self, hidden: Tensor) -> Tensor:
        """Applies the head. hidden: [*, D] -> [*, V]."""
        if self.packed_head is not None:
            return packed_linear(hidden, self.packed_head, None)
        return self.parallel_hooks.logits(hidden, self.head_weight)

    def scale_hidden(self, hidden: Tensor) -> Tensor:
        """Scales hidden states before the head; the identity unless overridden. hidden: [*, D] -> [*, D]."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [*, D] -> next-token logits [*, V]."""
        return self.project(self.scale_hidden(hidden))

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of each target after each hidden state, in nats. hidden: [R, D], targets: [R] int64 -> [R] fp32."""
        return self.parallel_hooks.cross_entropy(self.scale_hidden(hidden), self.head_weight, targets)

    @property
    def num_parameters(self) -> int:
        """Weights and biases, a tied head counted once; packed or not."""
        packed = sum(linear.in_features * linear.out_features for linear in self.linears() if linear.packed is not None)
        if self.packed_head is not None:
            packed += self.packed_head.out_features * self.config.hidden_size
        return packed + sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def _construct(cls, config: Any, folder: Path) -> Self:
        """A base for this config, without weights. Called within the meta device."""
        raise NotImplementedError

    def _fill_computed(self) -> None:
        """Fills buffers that follow from the configuration and are in no checkpoint."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        keep_storage: bool = False,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Read a Hugging Face folder (config.json and safetensors). Raises CheckpointError.

        dtype: what is computed in. keep_storage: where that is fp32, embeddings, linears and the head stay in the
        checkpoint's 16-bit type, if they have one, and are widened where they are used.
        """
        base = cls.on_meta_device(folder, dtype=dtype)
        if keep_storage and dtype == torch.float32:
            base.store_as(narrow_parameters(Path(folder), base.tensor_mappings()))
        base.to_empty(device=device)
        base.load_tensors(folder)
        return base.eval()

    @classmethod
    def on_meta_device(cls, folder: str | Path, *, dtype: torch.dtype) -> Self:
        """The base of a folder on the meta device, to be filled by `load_tensors`. Raises CheckpointError."""
        path = Path(folder)
        hf_config = read_config(path)
        family = cls.families.get(hf_config["model_type"])
        if family is None:
            raise CheckpointError(
                f"{path / 'config.json'}: model_type {hf_config['model_type']!r} is not read by {cls.__name__}, "
                f"which reads {', '.join(cls.families)}"
            )
        try:
            config = family.read_config(hf_config)
        except KeyError as error:
            raise CheckpointError(f"{path / 'config.json'}: lacks the field {error}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path / 'config.json'}: a field is malformed: {error}") from None
        with torch.device("meta"):
            base = cls._construct(config, path).to(dtype)
        base.compute_dtype = dtype
        return base

    def store_as(self, types: Mapping[str, torch.dtype]) -> None:
        """Change what weights are stored in, before they are filled. types: by the name of the parameter.

        Embeddings, linears and the head alone: norms and biases are small, and are read as fp32.
        """
        for name, module in self.named_modules():
            if isinstance(module, Embedding):
                module.compute_dtype = self.compute_dtype
            if (
                isinstance(module, Linear | Embedding | nn.Linear)
                and (dtype := types.get(f"{name}.weight")) is not None
            ):
                module.weight = nn.Parameter(module.weight.to(dtype))

    def load_tensors(self, folder: str | Path, cut: ShardSlice | None = None) -> None:
        """Reads the weights of a folder into a base made by `on_meta_device`. cut: see `load_checkpoint`."""
        self._fill_computed()
        load_checkpoint(self, Path(folder), self.tensor_mappings(), cut)
        self.fingerprint = fingerprint(Path(folder))

    def buffers_read(self) -> Iterator[Tensor]:
        """Every tensor that a forward pass reads besides its arguments."""
        yield from self.parameters()
        for linear in self.linears():
            if linear.packed is not None:
                yield linear.packed.panels
        if self.packed_head is not None:
            yield self.packed_head.panels

    def tensor_mappings(self) -> list[TensorMapping]:
        """The tensors of its checkpoint, each with the parameter that it fills."""
        return FAMILIES[self.config.family].tensor_mappings(self.config)

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
            for rename in self.tensor_mappings()
            if rename.ours in linears
        }
