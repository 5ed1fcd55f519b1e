"""The model, the adapter banks and the cache together: one batch in, the wanted logits out."""

import torch
from torch import Tensor

from quiver_peft.adapters.banks import AdapterBanks
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.paged import PagedAttention, PagedKV
from quiver_peft.base.paged_t5 import PackedAttention, PagedSources
from quiver_peft.base.sites import Seam
from quiver_peft.base.t5 import T5Base
from quiver_server.batch import StepBatch


class Runner:
    """Owns the device side of the engine. Used by the engine's thread only."""

    def __init__(self, base: GPTBase | T5Base, banks: AdapterBanks, kv: PagedKV) -> None:
        self._base = base
        self._banks = banks
        self._kv = kv

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Tensor:
        """Logits of the wanted rows, [R, V]; keys and values of all rows are in the cache afterwards."""
        base = self._base
        seam = self._banks.seam(batch.groups, batch.virtual)
        if isinstance(base, T5Base):
            hidden = self._decode(base, batch, seam)
        else:
            hidden = base(batch.tokens, batch.positions, PagedAttention(self._kv, batch.layout), seam)
        return base.logits(hidden[batch.logit_rows])

    def _decode(self, base: T5Base, batch: StepBatch, seam: Seam) -> Tensor:
        """The decoder's hidden states, [T, D]; new sources are encoded first."""
        new = batch.sources
        assert new is not None
        sources = PagedSources(self._kv, new.layout)
        if new.lengths:
            source_seam = self._banks.seam(new.groups, new.virtual)
            attend = PackedAttention(new.lengths, base.encoder.bias, new.tokens.device)
            base.read(base.encode(new.tokens, attend, source_seam), sources, source_seam)
        attend = PagedAttention(self._kv, batch.layout, base.decoder.bias)
        return base(batch.tokens, attend, sources, seam)
