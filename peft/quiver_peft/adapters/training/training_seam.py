"""The seam of a training batch: many adapters, each on rows of its own, in one forward and backward pass.

Rows are packed (`base/packed_sequences.py`): first all sequences of the first adapter, then those of the second, ...
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor, nn

from quiver_peft.adapters.methods.lora import LoraModule
from quiver_peft.adapters.training.trainable_adapter import AnyMethod, TrainableAdapter
from quiver_peft.base.sites import Linear, Site, StackName
from quiver_peft.kernels.lora_training import LoraPart, add_lora_

# Around what one adapter draws at random: gives it the generator of its own run.
RngScope = Callable[[], AbstractContextManager[None]]


class _Rows:
    """The rows of a stack: how many each adapter has, and where its sequences start. lengths: virtual included."""

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        self.sizes = [sum(own) for own in lengths]
        ends = list(accumulate(self.sizes))
        self.bounds = [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self._starts = [
            [first + end - length for end, length in zip(accumulate(own), own, strict=True)]
            for (first, _), own in zip(self.bounds, lengths, strict=True)
        ]
        self._device = device

    def places(self, adapter: int, first: int, number: int) -> Tensor:
        """Rows `first` to `first + number` of each of an adapter's sequences, one sequence after the other."""
        return torch.tensor(
            [start + first + i for start in self._starts[adapter] for i in range(number)], device=self._device
        )

    def num_sequences(self, adapter: int) -> int:
        """Of an adapter."""
        return len(self._starts[adapter])


class TrainingSeam:
    """What each of some adapters does to the rows that are its own.

    lengths: {stack: for each adapter the lengths of its sequences}, placeholders of virtual tokens included.
    drawing: for each adapter; None: all draw from torch's own generator, one after the other.
    """

    def __init__(
        self,
        adapters: Sequence[TrainableAdapter],
        lengths: Mapping[StackName, Sequence[Sequence[int]]],
        device: torch.device,
        drawing: Sequence[RngScope] | None = None,
    ) -> None:
        self._adapters = adapters
        self._methods: list[Sequence[AnyMethod]] = [adapter.ordered_methods for adapter in adapters]
        self._rows = {stack: _Rows(own, device) for stack, own in lengths.items()}
        own = drawing or [nullcontext] * len(adapters)
        self._rng_scope: list[RngScope] = [
            d if a.needs_rng else nullcontext for d, a in zip(own, adapters, strict=True)
        ]
        self._scaling_inputs = [_with_hook(methods, "scale_input") for methods in self._methods]
        self._scaling_outputs = [_with_hook(methods, "scale_output") for methods in self._methods]
        self._after_sublayers = [_with_hook(methods, "sublayer") for methods in self._methods]

    def embed(self, site: Site, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """Word embeddings, the placeholders' replaced. tokens: [T] -> [T, D]."""
        embedded = embedding(tokens)
        rows = self._rows[site.stack]
        places: list[Tensor] = []
        virtual: list[Tensor] = []
        for i, methods in enumerate(self._methods):
            first = 0
            for method in methods:
                number = method.num_virtual_in(site.stack)
                if number:
                    with self._rng_scope[i]():
                        found = method.virtual_embeddings()
                    found = embedded.new_zeros(number, embedded.shape[-1]) if found is None else found
                    places.append(rows.places(i, first, number))
                    virtual.append(found.to(embedded.dtype).repeat(rows.num_sequences(i), 1))
                first += number
        return embedded.index_copy(0, torch.cat(places), torch.cat(virtual)) if places else embedded

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """The base's linear once for all rows, and around it what each adapter does. x: [T, K] -> [T, N]."""
        rows = self._rows_at(linear.site)
        x = self._each(self._scaling_inputs, rows, (x,), lambda method, own: method.scale_input(linear, *own))
        y = self._add_lora(rows, linear, x, linear(x))
        return self._each(self._scaling_outputs, rows, (y,), lambda method, own: method.scale_output(linear, *own))

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """What is added to the residual stream. out, residual: [T, D] -> [T, D]."""
        rows = self._rows[site.stack]
        return self._each(self._after_sublayers, rows, (out, residual), lambda method, own: method.sublayer(site, *own))

    def key_values(self, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of the prefixes in their rows. k, v: [T, G, E]."""
        rows = self._rows[site.stack]
        for i, methods in enumerate(self._methods):
            first = 0
            for method in methods:
                number = method.num_virtual_in(site.stack)
                found = method.virtual_key_values(site.layer) if number else None
                if found is not None:
                    places, copies = rows.places(i, first, number), (rows.num_sequences(i), 1, 1)
                    k, v = (
                        old.index_copy(0, places, new.to(old.dtype).repeat(copies))
                        for old, new in zip((k, v), found, strict=True)
                    )
                first += number
        return k, v

    def _rows_at(self, site: Site) -> _Rows:
        # What the decoder knows of sources it computes from the encoder's rows.
        return self._rows["encoder" if site.kind == "cross_attention.kv" else site.stack]

    def _add_lora(self, rows: _Rows, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        parts: list[LoraPart] = []
        random: dict[int, LoraModule] = {}
        for i, (adapter, bounds) in enumerate(zip(self._adapters, rows.bounds, strict=True)):
            lora = adapter.lora
            if lora is None:
                continue
            if lora.needs_rng:
                random[i] = lora
            else:
                parts += [
                    LoraPart(bounds, pair.target.rows, pair.scale, pair.a, pair.b)
                    for pair in lora.pairs_at(linear.site)
                ]
        if parts:
            y = add_lora_(y, x, parts)
        if not random:
            return y
        added = list(y.split(rows.sizes))
        for i, own_x in enumerate(x.split(rows.sizes)):
            if i in random:
                with self._rng_scope[i]():
                    added[i] = random[i].add_output(linear, own_x, added[i])
        return torch.cat(added)

    def _each(
        self,
        acting: Sequence[Sequence[AnyMethod]],
        rows: _Rows,
        tensors: tuple[Tensor, ...],
        act: Callable[[AnyMethod, tuple[Tensor, ...]], Tensor],
    ) -> Tensor:
        """The first tensor, after each adapter's methods acted on its rows of all; itself where none did anything."""
        if not any(acting):
            return tensors[0]
        changed = False
        parts: list[Tensor] = []
        for i, (before, *others) in enumerate(zip(*(tensor.split(rows.sizes) for tensor in tensors), strict=True)):
            part = before
            if acting[i]:
                with self._rng_scope[i]():
                    for method in acting[i]:
                        part = act(method, (part, *others))
            changed = changed or part is not before
            parts.append(part)
        if not changed:
            return tensors[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _with_hook(methods: Sequence[AnyMethod], action: str) -> list[AnyMethod]:
    """Those that do anything then. A LoRA scales outputs only as DoRA."""
    found = [method for method in methods if action in type(method).__dict__]
    return [m for m in found if not (isinstance(m, LoraModule) and action == "scale_output" and not m.config.use_dora)]
