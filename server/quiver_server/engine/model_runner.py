"""The model, the adapter banks and the cache together: one batch in, the wanted logits out."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quiver_peft.adapters.serving.banks import AdapterBanks
from quiver_peft.adapters.serving.cpp_seam import CppSeam
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV
from quiver_peft.base.paged_t5 import PackedAttention, PagedSources
from quiver_peft.base.sites import NO_ADAPTERS, Seam
from quiver_peft.base.t5 import T5Base
from quiver_peft.kernels.cpp.library import library
from quiver_peft.kernels.cpp.step_graph import StepGraphs
from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_server.engine.batch import StepBatch
from quiver_server.engine.encoder_batch import EncoderBatch


class ModelRunner:
    """Owns the device side of the engine. Used by the engine's thread only."""

    def __init__(self, base: GPTBase | T5Base, banks: AdapterBanks, kv: PagedKV, max_step_tokens: int) -> None:
        """max_step_tokens: the most that a batch or its sources have."""
        self._base = base
        self._banks = banks
        self._kv = kv
        cpp = library() if kv.keys.is_cpu and base.compute_dtype == torch.float32 else None
        self._position_biases = _relative_position_biases(base)
        self._step_graphs = None if cpp is None else StepGraphs(cpp, self._constants(), max_step_tokens)

    def _constants(self) -> Iterator[Tensor]:
        yield from self._base.buffers_read()
        yield from self._position_biases.values()
        yield from (self._kv.keys, self._kv.values)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Tensor:
        """Logits of the wanted rows, [R, V]; keys and values of all rows are in the cache afterwards."""
        base = self._base
        seam = self._banks.seam(batch.groups, batch.virtual)
        hidden = (
            self._run_encoder_decoder(base, batch, seam)
            if isinstance(base, T5Base)
            else self._decode(base, batch, seam)
        )
        assert hidden is not None
        return base.logits(hidden[batch.logit_rows])

    def _decode(self, base: GPTBase, batch: StepBatch, seam: Seam) -> Tensor | None:
        """Hidden states, [T, D]."""

        def make() -> Tensor:
            return base(batch.tokens, batch.positions, PagedAttention(self._kv, batch.layout), seam)

        return self._step("decode", make, seam, [batch.tokens, batch.positions, batch.layout.new_rows], [batch.layout])

    def _run_encoder_decoder(self, base: T5Base, batch: StepBatch, seam: Seam) -> Tensor | None:
        """The decoder's hidden states, [T, D]; new sources are encoded first."""
        new = batch.encoder
        assert new is not None
        sources = PagedSources(self._kv, new.layout)
        if new.lengths:
            self._encode(base, new, sources)

        def make() -> Tensor:
            return base(
                batch.tokens, PagedAttention(self._kv, batch.layout, self._position_biases["decoder"]), sources, seam
            )

        layouts = [batch.layout, new.layout.attended]
        return self._step("decode", make, seam, [batch.tokens, batch.layout.new_rows], layouts)

    def _encode(self, base: T5Base, new: EncoderBatch, sources: PagedSources) -> None:
        """Keep what the decoder will attend to."""
        seam = self._banks.seam(new.groups, new.virtual)
        attend = PackedAttention(new.lengths, self._position_biases["encoder"], new.tokens.device)

        def make() -> None:
            base.precompute_cross_kv(base.encode(new.tokens, attend, seam), sources, seam)

        assert new.layout.new_rows is not None
        self._step("encode", make, seam, [new.tokens, new.layout.new_rows], [attend.layout])

    def _step(
        self,
        name: str,
        make: Callable[[], Tensor | None],
        seam: Seam,
        rows: Sequence[Tensor],
        layouts: Sequence[PagedLayout],
    ) -> Tensor | None:
        """What `make` returns, by a program where there can be one.

        rows: its inputs that have a number for each row. layouts: its other ones, beside the seam.
        """
        is_cpp_seam = isinstance(seam, CppSeam) and not seam.has_virtual
        if self._step_graphs is None or not (seam is NO_ADAPTERS or is_cpp_seam):
            return make()
        inputs = [numbers.data_ptr() for numbers in rows] + [layout.address for layout in layouts]
        if isinstance(seam, CppSeam):
            return self._step_graphs.run((name, seam.acts), make, len(rows[0]), [*inputs, seam.address])
        return self._step_graphs.run((name, None), make, len(rows[0]), inputs)


def _relative_position_biases(base: GPTBase | T5Base) -> dict[str, Tensor]:
    """By stack."""
    if isinstance(base, GPTBase):
        return {}
    return {
        name: stack.bias.bias_for_offsets().detach()
        for name, stack in (("encoder", base.encoder), ("decoder", base.decoder))
    }
